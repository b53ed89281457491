"""A step of many adapters is the step that torch's AdamW takes for each alone, through PEFT."""

import io
from math import inf, isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from dvora.training import recommended_rates
from tests.bank.tenants import HEADED, MLP
from tests.bank.trained import (
    BATCHES,
    NAMES,
    Alone,
    batch_of,
    largest_difference,
    row_losses,
    save_all,
    together,
)
from tests.peft.kinds import GROUPS, Kind, mlp

HALF = Kind(lambda: HEADED.base().bfloat16(), HEADED.settings)
BOTH = {"weight_decay": 0.3, "max_grad_norm": 0.05}
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "plain": (HEADED, {}),
    "weight decay": (HEADED, {"weight_decay": 0.3}),
    "clipping": (HEADED, {"max_grad_norm": 0.05}),
    "both": (HEADED, BOTH),
    # What is not trained neither moves nor counts in the norm.
    "magnitudes": (mlp(train=["magnitude"]), BOTH),
    "layers with magnitudes only": (mlp(target_modules=["lin1"], magnitude_modules=["lin0"]), BOTH),
    "a head in half precision": (HALF, {}),
    "groups": (HEADED.by_groups(GROUPS), BOTH),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_each_alone(name: str, tmp_path: Path) -> None:
    kind, options = CASES[name]
    save_all(kind, tmp_path)
    with together(kind, tmp_path, **options) as both:
        alone = Alone(tmp_path, kind.base, **options)
        every = [both.optimizer, *alone.optimizers.values()]
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in every]
        for number, names in enumerate(BATCHES):
            batch = batch_of(both.model, names, number)
            both.step(batch)
            alone.step(batch)
            for schedule in schedules:
                schedule.step()
        assert largest_difference(both, alone) < (0.02 if kind is HALF else 1e-5)


def test_what_only_ran_is_not_stepped(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        both.step(batch_of(both.model, NAMES))
        before = both.adapters.state_dict()["vectors"]
        # Without a backward pass, and with gradients that are forgotten.
        with both.adapters.rows(["b"]):
            both.model(**batch_of(both.model, ["b"]).inputs)
        both.backward(batch_of(both.model, NAMES))
        both.optimizer.zero_grad()
        both.backward(batch_of(both.model, ["a"]))
        both.optimizer.step()
        assert (both.adapters.state_dict()["vectors"] != before).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["in order", "the last one first"])
def test_gradients_of_several_passes_accumulate(order: list[int], tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path, max_grad_norm=0.05) as both:
        alone, names = Alone(tmp_path, HEADED.base, max_grad_norm=0.05), ["a", "b", "a"]
        for number in range(3):
            batches = [batch_of(both.model, names, number), batch_of(both.model, names, number + 7)]
            with both.adapters.rows(names) as rows:
                losses = [rows.loss(row_losses(both.model, batch.inputs)) for batch in batches]
                for which in order:
                    (losses[which] / 2).backward()
                other = batch_of(both.model, ["c", "a"], number)
            both.backward(other, 0.5)
            both.update()
            for batch in (*batches, other):
                alone.backward(batch, 0.5)
            alone.update(NAMES)
        assert largest_difference(both, alone) < 1e-5


def test_a_closure_computes_the_gradients_and_a_batch_may_have_several_steps(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as one, together(MLP, tmp_path) as other:
        batch = batch_of(one.model, ["a", "b"])
        with one.adapters.rows(batch.names) as rows:

            def closure() -> float:
                one.optimizer.zero_grad()
                loss = rows.loss(row_losses(one.model, batch.inputs))
                loss.backward()
                return loss.item()

            first = one.optimizer.step(closure)
            assert one.optimizer.step(closure) < first
        other.step(batch)
        other.step(batch)
        assert torch.equal(*(each.adapters.state_dict()["vectors"] for each in (one, other)))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with (
        together(HEADED, tmp_path, max_grad_norm=0.05) as whole,
        together(HEADED, tmp_path, max_grad_norm=0.05) as resumed,
    ):
        batches = [batch_of(whole.model, names, number) for number, names in enumerate(BATCHES)]
        for batch in batches[:3]:
            whole.step(batch)
        file = io.BytesIO()
        torch.save([whole.adapters.state_dict(), whole.optimizer.state_dict()], file)
        file.seek(0)
        values, state = torch.load(file)
        resumed.adapters.load_state_dict(values)
        resumed.optimizer.load_state_dict(state)
        for batch in batches[3:]:
            whole.step(batch)
            resumed.step(batch)
        for one, other in zip(whole.adapters.parameters(), resumed.adapters.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("cause", ["loss", "values"])
def test_an_adapter_that_diverges_is_left_alone_and_the_others_go_on(cause: str, tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path) as one, together(HEADED, tmp_path) as other:
        batch = batch_of(one.model, ["a", "b", "c", "b"])
        if cause == "values":
            with torch.no_grad():
                for parameter in one.adapters.parameters_of["b"].values():
                    parameter.mul_(1e30)
        before = one.adapters.flat_vector("b")
        with one.adapters.rows(batch.names) as rows:
            losses = row_losses(one.model, batch.inputs)
            if cause == "loss":
                losses = losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])
            rows.loss(losses).backward()
        with pytest.warns(UserWarning, match=r"the gradient of 'b' \(1 of 3 adapters\) is not finite"):
            norms = one.adapters.clip_grad_norm_(inf)
        assert [isfinite(norms[name]) for name in NAMES] == [True, False, True]
        one.optimizer.step()
        other.step(batch)
        assert torch.equal(one.adapters.flat_vector("b"), before)
        for name in ("a", "c"):
            assert torch.equal(one.adapters.flat_vector(name), other.adapters.flat_vector(name))


def test_without_a_gradient_there_is_nothing_to_clip(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        assert both.adapters.clip_grad_norm_(1.0) == {}


def test_usual_rates_are_the_recommended_ones_of_what_is_trained(tmp_path: Path) -> None:
    for kind in (HEADED, mlp(train=["magnitude"])):
        save_all(kind, tmp_path)
        with together(kind, tmp_path) as both:
            rates = {group["name"]: group["lr"] for group in both.adapters.parameter_groups(0.02)}
        assert rates == pytest.approx(recommended_rates(kind.fresh(), 0.02))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be finite and not negative"),
        ({"learning_rates": {"magnitudes": 0.1}}, "learning_rates names the group 'magnitudes', expected one of magn"),
        ({"learning_rates": {"head": 0.1}}, "'head', of which the model trains nothing"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both, pytest.raises(ValueError, match=message):
        both.adapters.parameter_groups(**options)
