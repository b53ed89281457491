"""A step of many adapters is the step that torch's AdamW takes for each alone, through PEFT."""

import copy
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dvora.bank import TenantAdamW
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
from tests.peft.kinds import Kind, mlp

HALF = Kind(lambda: HEADED.base().bfloat16(), HEADED.settings)
EVERYTHING = {"weight_decay": 0.3, "max_grad_norm": 0.05, "shares": {"a": 3.0}}
CASES: dict[str, tuple[Kind, dict[str, Any]]] = {
    "plain": (HEADED, {}),
    "weight decay": (HEADED, {"weight_decay": 0.3}),
    "clipping": (HEADED, {"max_grad_norm": 0.05}),
    "shares": (HEADED, {"shares": {"b": 0.25, "c": 0.0}}),
    "everything": (HEADED, EVERYTHING),
    # What is not trained neither moves nor counts in the norm.
    "magnitudes": (mlp(train=["magnitude"]), EVERYTHING),
    "layers with magnitudes only": (mlp(target_modules=["lin1"], magnitude_modules=["lin0"]), EVERYTHING),
    "a head in half precision": (HALF, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_each_alone(name: str, tmp_path: Path) -> None:
    kind, options = CASES[name]
    save_all(kind, tmp_path)
    with together(kind, tmp_path, **options) as both:
        alone = Alone(tmp_path, kind.base, **options)
        start = both.adapters.vectors.detach().clone()
        every = [both.optimizer, *alone.optimizers.values()]
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in every]
        for number, names in enumerate(BATCHES):
            batch = batch_of(both.model, names, number)
            both.step(batch)
            alone.step(batch)
            for schedule in schedules:
                schedule.step()
        assert largest_difference(both, alone) < (0.02 if kind is HALF else 1e-5)
        moved = (both.adapters.vectors - start).abs().amax(1) > 1e-3
        assert moved.tolist() == [options.get("shares", {}).get(name, 1) > 0 for name in NAMES]


def test_what_only_ran_is_not_stepped(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        both.step(batch_of(both.model, NAMES))
        before = both.adapters.vectors.detach().clone()
        # Without a backward pass, and with gradients that are forgotten.
        with both.adapters.rows(["b"]):
            both.model(**batch_of(both.model, ["b"]).inputs)
        both.backward(batch_of(both.model, NAMES))
        both.optimizer.zero_grad()
        both.backward(batch_of(both.model, ["a"]))
        both.optimizer.step()
        assert (both.adapters.vectors != before).any(1).tolist() == [True, False, False]


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
            both.optimizer.step()
            both.optimizer.zero_grad()
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
        assert torch.equal(one.adapters.vectors, other.adapters.vectors)


def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path, max_grad_norm=0.05) as whole, together(HEADED, tmp_path) as resumed:
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
def test_an_adapter_that_diverges_stops_alone(cause: str, tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path) as one, together(HEADED, tmp_path) as other:
        names = ["a", "b", "c", "b"]
        for number in range(4):
            batch, before = batch_of(one.model, names, number), one.adapters.flat_vector("b")
            other.step(batch)
            one.optimizer.zero_grad()
            if cause == "values" and number == 1:
                with torch.no_grad():
                    one.adapters.vectors[1] *= 1e30
                before = one.adapters.flat_vector("b")
            with one.adapters.rows(names) as rows:
                losses = row_losses(one.model, batch.inputs)
                if cause == "loss" and number == 1:
                    losses = losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])
                rows.loss(losses).backward()
            warned = pytest.warns(UserWarning, match="'b' has a gradient that is not finite after 1 steps")
            with warned if number == 1 else nullcontext():
                one.optimizer.step()
            assert torch.equal(one.adapters.flat_vector("b"), before) == (number > 0)
        for name in ("a", "c"):
            assert torch.equal(one.adapters.flat_vector(name), other.adapters.flat_vector(name))
        assert (one.optimizer.stopped, other.optimizer.stopped) == ({"b": 1}, {})
        other.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
        assert other.optimizer.stopped == {"b": 1}


def test_usual_rates_are_the_recommended_ones(tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path) as both:
        # A first step of Adam is as long as the rate, without eps.
        optimizer = TenantAdamW(both.adapters, 0.02, eps=1e-30)
        before = [parameter.detach().clone() for parameter in both.adapters.parameters()]
        both.backward(batch_of(both.model, NAMES))
        optimizer.step()
        vectors, heads = (
            (p.detach() - start).abs() for p, start in zip(both.adapters.parameters(), before, strict=True)
        )
        for kind, rate in recommended_rates(HEADED.fresh(), 0.02).items():
            moved = heads if kind == "head" else vectors[:, both.adapters.values_of(kind)]
            assert float(moved.max()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must not be zero"),
        ({"learning_rates": {"magnitudes": 0.1}}, "learning_rates names 'magnitudes', expected some of magnitude, lam"),
        ({"learning_rates": {"head": -1.0}}, r"learning_rates\['head'\] must be finite and not negative, got -1.0"),
        ({"shares": {"d": 1.0}}, "'d' is none of the 3 adapters in training"),
        ({"shares": {"a": -1.0}}, r"shares\['a'\] must be finite and not negative"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and not negative"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both, pytest.raises(ValueError, match=message):
        TenantAdamW(both.adapters, **options)
