"""Parts of a pass that run again in the backward pass, with the factors of their own pass or of a later one."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dvora.ops.passes import current_pass
from tests.tuner.towers import Results, adapted, alone, calls, evaluated, inner, inputs, layer_of, loss_of, trained

__all__ = ["calls"]


@pytest.fixture(autouse=True)
def no_pass_is_left() -> Iterator[None]:
    yield
    assert current_pass() is None


def checkpointed(model: PeftModel, use_reentrant: bool) -> PeftModel:
    """The same model with its second half checkpointed."""
    base = inner(model)

    def first(x: Tensor) -> Tensor:
        return base.middle(torch.tanh(base.lin1(torch.tanh(base.lin0(x)))))

    def second(x: Tensor) -> Tensor:
        return base.lin3(torch.tanh(base.lin2(x)))

    base.forward = lambda x: checkpoint(second, first(x), use_reentrant=use_reentrant)
    return model


both_checkpoints = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])


@both_checkpoints
def test_a_checkpointed_part_has_the_same_gradients(use_reentrant: bool) -> None:
    model = adapted()
    expected = trained(alone(model))
    checkpointed(model, use_reentrant)
    for _ in range(3):
        assert trained(model).differ(expected) < 1e-5


@both_checkpoints
def test_the_whole_model_may_be_checkpointed(use_reentrant: bool) -> None:
    model = adapted()
    x = inputs().requires_grad_()
    for _ in range(3):
        expected = trained(alone(model), x)
        model.zero_grad()
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        loss_of(y).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert Results(outputs=y.detach(), **found).differ(expected) < 1e-5
        assert current_pass() is None
        for vector in layer_of(model).vectors("default"):
            vector.data.mul_(1.1)


@both_checkpoints
@pytest.mark.parametrize("passes_before", [0, 1, 2])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_may_run_again_with_the_factors_of_a_later_pass(
    order: tuple[int, int], passes_before: int, use_reentrant: bool
) -> None:
    model = adapted()
    plain = alone(model)
    checkpointed(model, use_reentrant)
    for _ in range(passes_before):
        trained(model)
    results = []
    for each in (plain, model):
        each.zero_grad()
        losses = [loss_of(each(inputs(seed))) for seed in (1, 2)]
        for index in order:
            losses[index].backward()
        results.append(Results({n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}))
    assert results[1].differ(results[0]) < 1e-5


# The evaluation's, of a checkpoint that is not needed there.
@both_checkpoints
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_an_evaluation_between_the_two_runs_of_a_part_disturbs_nothing(use_reentrant: bool) -> None:
    model = adapted()
    expected = trained(alone(model))
    checkpointed(model, use_reentrant)
    for _ in range(3):
        model.zero_grad()
        y = model(inputs())
        evaluated(model)
        loss_of(y).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert Results(outputs=y.detach(), **found).differ(expected) < 1e-5


def test_a_part_that_is_not_reentrant_runs_again_with_the_factors_of_its_pass(calls: Counter[int]) -> None:
    model = checkpointed(adapted(), use_reentrant=False)
    trained(model)
    for vector in layer_of(model).vectors("default"):
        vector.data.mul_(1.1)
    calls.clear()
    trained(model)
    assert calls == {4: 1}


def test_the_first_pass_may_run_again_with_measured_rows_after_a_second_one_was_made() -> None:
    """Rows that are nearly cancelled have a graph of their own, within the checkpoint in the first pass only."""
    model = adapted().double()
    layer = layer_of(model)
    with torch.no_grad():
        # Row 0 becomes almost the opposite of its update.
        adapted_weight, (magnitude, lambda_b, lambda_d) = layer.adapted("default"), layer.vectors("default")
        A, B = adapted_weight.A(lambda_d), adapted_weight.B(lambda_d)
        update = (B[0] * lambda_d) @ A
        layer.base_layer.weight[0] = -update / update.norm() + 1e-3 * torch.randn(8, dtype=torch.float64)
        lambda_b[0] = 1 / update.norm() / layer.base_layer.weight[0].norm()
        magnitude[0] = 1.0
    x, plain = inputs().double(), alone(model)
    checkpointed(model, use_reentrant=False)
    first, second = loss_of(model(x)), loss_of(model(2 * x))
    assert layer_of(model, "lin0").adapted("default").kept.stacked is None  # measured: it serves once
    first.backward()
    second.backward()
    found = layer.vectors("default").lambda_b.grad.clone()
    (loss_of(plain(x)) + loss_of(plain(2 * x))).backward()
    torch.testing.assert_close(found, layer_of(plain).vectors("default").lambda_b.grad)
