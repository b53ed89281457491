"""Parts of a pass that run again in the backward pass, with the factors of their own pass or of a later one."""

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dvora.ops.passes import current_pass
from tests.tuner.towers import Results, adapted, alone, evaluated, inner, inputs, layer_of, loss_of, trained


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
