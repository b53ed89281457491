"""A step of many adapters is the step that torch's AdamW takes for each alone, through PEFT."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from dvora.bank import TenantAdamW
from dvora.training import recommended_rates
from tests.bank.trained import (
    BATCHES,
    NAMES,
    Alone,
    Together,
    batch_of,
    largest_difference,
    row_losses,
    save_all,
    together,
)
from tests.peft.kinds import Kind, mlp
from tests.peft.tiny import LAYERS, MODELS

MLP = mlp()
HEADED = mlp(target_modules=["lin0", "lin1"], modules_to_save=["lin2"])
BERT = Kind(MODELS["bert"], {"r": 3, "target_modules": LAYERS["bert"], "modules_to_save": ["classifier"]})


def run(both: Together, alone: Alone) -> None:
    for number, names in enumerate(BATCHES):
        batch = batch_of(both.model, names, number)
        both.step(batch)
        alone.step(batch)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.3},
    "clipping": {"max_grad_norm": 0.05},
    "shares": {"shares": {"b": 0.25, "c": 0.0}},
    "all": {"weight_decay": 0.3, "max_grad_norm": 0.05, "shares": {"a": 3.0}},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [MLP, HEADED], ids=["vectors", "with a head"])
def test_steps_are_those_of_each_alone(kind: Kind, name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    save_all(kind, tmp_path)
    with together(kind, tmp_path, **options) as both:
        alone = Alone(tmp_path, kind.base, **options)
        start = both.adapters.vectors.detach().clone()
        run(both, alone)
        assert largest_difference(both, alone) < 1e-5
        moved = (both.adapters.vectors - start).abs().amax(1) > 1e-3
        assert moved.tolist() == [options.get("shares", {}).get(name, 1) > 0 for name in NAMES]


@pytest.mark.parametrize(
    "settings",
    [
        {"train": ["magnitude"]},
        {"train": ["lambda_d", "lambda_b"]},
        {"target_modules": ["lin1"], "magnitude_modules": ["lin0"]},
    ],
    ids=["magnitudes", "lambdas", "layers with magnitudes only"],
)
def test_what_an_adapter_does_not_train_neither_moves_nor_counts_in_its_norm(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    kind = Kind(MLP.base, {**MLP.settings, **settings})
    save_all(kind, tmp_path)
    with together(kind, tmp_path, max_grad_norm=0.02, weight_decay=0.3) as both:
        alone = Alone(tmp_path, kind.base, max_grad_norm=0.02, weight_decay=0.3)
        run(both, alone)
        assert largest_difference(both, alone) < 1e-5


def test_what_only_ran_is_not_stepped(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        first = batch_of(both.model, ["a", "b", "c"])
        both.step(first)
        before = both.adapters.vectors.detach().clone()
        both.optimizer.zero_grad()
        with both.adapters.rows(["b"]), torch.no_grad():
            both.model(**batch_of(both.model, ["b"]).inputs)
        with both.adapters.rows(["c"]):
            both.model(**batch_of(both.model, ["c"]).inputs)
        both.backward(first)
        both.optimizer.zero_grad()
        both.backward(batch_of(both.model, ["a"]))
        both.optimizer.step()
        assert (both.adapters.vectors != before).any(1).tolist() == [True, False, False]


def test_several_steps_within_one_rows(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as one, together(MLP, tmp_path) as other:
        batches = [batch_of(one.model, ["a", "b"], number) for number in range(3)]
        with one.adapters.rows(["a", "b"]) as rows:
            for batch in batches:
                one.optimizer.zero_grad()
                rows.loss(row_losses(one.model, batch.inputs)).backward()
                one.optimizer.step()
        for batch in batches:
            other.step(batch)
        assert torch.equal(one.adapters.vectors, other.adapters.vectors)


@pytest.mark.parametrize("is_one_batch", [True, False])
def test_gradients_accumulate(is_one_batch: bool, tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    with together(HEADED, tmp_path, max_grad_norm=0.05) as both:
        alone = Alone(tmp_path, HEADED.base, max_grad_norm=0.05)
        for number in range(3):
            first = batch_of(both.model, ["a", "b", "a"], number)
            second = batch_of(both.model, first.names if is_one_batch else ["c", "a"], number + 7)
            if is_one_batch:
                with both.adapters.rows(first.names) as rows:
                    found = [rows.loss(row_losses(both.model, batch.inputs)) for batch in (first, second)]
                    # In the order of training loops, and in the other one.
                    for loss in found if number else reversed(found):
                        (loss / 2).backward()
            for batch in (first, second):
                if not is_one_batch:
                    both.backward(batch, 0.5)
                alone.backward(batch, 0.5)
            both.optimizer.step()
            both.optimizer.zero_grad()
            alone.update([*first.names, *second.names])
        assert largest_difference(both, alone) < 1e-5


def test_schedulers_change_the_rates_of_all(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both:
        alone = Alone(tmp_path, MLP.base)
        every = [both.optimizer, *alone.optimizers.values()]
        schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 / (1 + step)) for each in every]
        for number in range(4):
            batch = batch_of(both.model, ["a", "b", "c", "a"], number)
            both.step(batch)
            alone.step(batch)
            for schedule in schedules:
                schedule.step()
        assert both.optimizer.param_groups[0]["lr"] == 0.01 / 5
        assert largest_difference(both, alone) < 1e-5


def test_a_closure_computes_the_gradients(tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as one, together(MLP, tmp_path) as other:
        batch = batch_of(one.model, ["a", "b"])

        def closure() -> float:
            one.optimizer.zero_grad()
            with one.adapters.rows(batch.names) as rows:
                loss = rows.loss(row_losses(one.model, batch.inputs))
                loss.backward()
            return loss.item()

        assert one.optimizer.step(closure) > 0
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
@pytest.mark.parametrize("kind", [MLP, BERT], ids=["vectors", "with a head"])
def test_an_adapter_that_diverges_stops_alone(kind: Kind, cause: str, tmp_path: Path) -> None:
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as one, together(kind, tmp_path) as other:
        batches = [batch_of(one.model, ["a", "b", "c", "b"], number) for number in range(4)]
        for number, batch in enumerate(batches):
            if cause == "values" and number == 1:
                with torch.no_grad():
                    one.adapters.vectors[1] *= 1e30
            before = one.adapters.flat_vector("b")
            for both in (one, other):
                both.optimizer.zero_grad()
                with both.adapters.rows(batch.names) as rows:
                    own = row_losses(both.model, batch.inputs)
                    if cause == "loss" and both is one and number == 1:
                        own = own * torch.tensor([1.0, float("nan"), 1.0, 1.0])
                    rows.loss(own).backward()
                if both is one and number == 1:
                    with pytest.warns(UserWarning, match="'b' has a gradient that is not finite after 1 steps"):
                        both.optimizer.step()
                else:
                    both.optimizer.step()
            assert torch.equal(one.adapters.flat_vector("b"), before) == (number > 0)
        assert one.optimizer.stopped == {"b": 1}
        assert other.optimizer.stopped == {}
        for name in ("a", "c"):
            assert torch.equal(one.adapters.flat_vector(name), other.adapters.flat_vector(name))
        assert one.adapters.flat_vector("b").isfinite().all()
        state = copy.deepcopy(one.optimizer.state_dict())
        other.optimizer.load_state_dict(state)
        assert other.optimizer.stopped == {"b": 1}


def test_heads_in_half_precision(tmp_path: Path) -> None:
    half = Kind(lambda: HEADED.base().bfloat16(), HEADED.settings)
    save_all(half, tmp_path)
    with together(half, tmp_path) as both:
        alone = Alone(tmp_path, half.base)
        assert both.adapters.heads.dtype == torch.bfloat16
        run(both, alone)
        assert largest_difference(both, alone) < 0.02


def test_usual_rates_are_the_recommended_ones(tmp_path: Path) -> None:
    save_all(HEADED, tmp_path)
    fresh = HEADED.fresh()
    with together(HEADED, tmp_path) as both:
        optimizer = TenantAdamW(both.adapters, 0.02)
        for kind, rate in recommended_rates(fresh, 0.02).items():
            parameter = both.adapters.heads if kind == "head" else both.adapters.vectors
            (relative, _) = optimizer._relative[parameter]
            own = relative if kind == "head" else relative[both.adapters.values_of(kind)]
            torch.testing.assert_close(0.02 * own, torch.full_like(own, rate))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must not be zero"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rates": {"magnitudes": 0.1}}, "learning_rates names 'magnitudes', expected some of magnitude, lam"),
        ({"learning_rates": {"head": -1.0}}, r"learning_rates\['head'\] must be finite and not negative, got -1.0"),
        ({"shares": {"d": 1.0}}, "'d' is none of the 3 adapters in training"),
        ({"shares": {"a": -1.0}}, r"shares\['a'\] must be finite and not negative"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
        ({"eps": float("inf")}, "eps must be finite"),
        ({"betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and not negative"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_all(MLP, tmp_path)
    with together(MLP, tmp_path) as both, pytest.raises(ValueError, match=message):
        TenantAdamW(both.adapters, **options)
