"""What training keeps, anywhere: for the backward pass one tensor of outputs a layer, one z for siblings; then nothing.

The plain layer keeps its input too, for its explicit `backward`, until a backward pass has come through.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from dvora.matrices import dense
from tests.cases import SHARED, linear, randn, train, trained_layer
from tests.census import Census

TOKENS, IN, OUT, RANK = 400, 72, 96, 8
INPUTS, OUTPUTS, Z = TOKENS * IN, TOKENS * OUT, TOKENS * RANK
DTYPES = [torch.float32, torch.bfloat16]
SMALL = 10_000
"""Bytes a layer: vectors, their gradients, half_dq."""

both_kinds = pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
frozen_or_not = pytest.mark.parametrize("inputs_trained", [True, False], ids=["trained inputs", "frozen inputs"])
both_checkpoints = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])


def plain_adapter(layer: nn.Linear, distribution: str) -> nn.Module:
    return train(DVoRAAdapter(layer, RANK, shared=SharedProjections(3, distribution)))


def peft_model(layer: nn.Linear, distribution: str) -> nn.Module:
    config = DVoRAConfig(r=RANK, target_modules=["0"], projection_init=distribution)
    model = get_peft_model(nn.Sequential(layer), config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            change = 0.3 * randn(*parameter.shape, seed=index)
            parameter.data.add_(0.0 if "magnitude" in name else change)
    return model


both_layers = pytest.mark.parametrize(("adapted", "inputs"), [(plain_adapter, INPUTS), (peft_model, 0)])


class Kept:
    """What the second of two training steps keeps until its backward pass, and behind it: sizes in bytes.

    Args:
        loss: a forward pass; it makes the tensors that it passes to layers, so that nobody else holds them.
        anyway: tensors that do not count.
    """

    def __init__(self, loss: Callable[[], Tensor], anyway: Iterable[Tensor] = ()) -> None:
        # The first makes what is made once: matrices, gradients, memory that is used again.
        loss().backward()
        with Census() as census:
            made = loss()
            self.until_backward = census.held(anyway)
            made.backward()
            del made
            self.behind = census.held(anyway)


@both_layers
@both_kinds
@both_dtypes
@with_and_without_bias
@frozen_or_not
def test_a_layer_keeps_z_and_one_tensor_of_outputs(
    adapted: Callable[[nn.Linear, str], nn.Module],
    inputs: int,
    distribution: str,
    dtype: torch.dtype,
    bias: bool,
    inputs_trained: bool,
) -> None:
    model = adapted(linear(IN, OUT, bias=bias, dtype=dtype), distribution)
    x = randn(4, TOKENS // 4, IN, seed=0, dtype=dtype).requires_grad_(inputs_trained)
    # A sum keeps nothing of the outputs, which are the caller's to write into.
    kept = Kept(lambda: model(1 * x).sum())
    assert sum(kept.until_backward) <= (OUTPUTS + Z + inputs) * dtype.itemsize + SMALL
    assert sum(kept.behind) <= SMALL
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@both_kinds
@both_dtypes
def test_no_copy_of_the_frozen_matrices_is_kept(
    distribution: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_KEPT_BYTES", 0)  # half_dq is as large
    layer = trained_layer(IN, OUT, IN, dtype=dtype, shared=SharedProjections(3, distribution))
    x = randn(16, IN, seed=0, dtype=dtype).requires_grad_()
    kept = Kept(lambda: layer(x).sum())
    assert max(kept.until_backward) <= 16 * OUT * dtype.itemsize < IN * IN * dtype.itemsize


@both_kinds
@both_dtypes
def test_siblings_share_one_z(distribution: str, dtype: torch.dtype) -> None:
    shared = SharedProjections(3, distribution)
    layers = [trained_layer(IN, OUT, RANK, dtype=dtype, shared=shared) for _ in range(3)]
    x = randn(TOKENS, IN, seed=0, dtype=dtype).requires_grad_()
    kept = Kept(lambda: sum(layer(read).sum() for read in [1 * x] for layer in layers))
    # All keep the same inputs.
    assert sum(kept.until_backward) <= (3 * OUTPUTS + Z + INPUTS) * dtype.itemsize + 3 * SMALL
    assert kept.until_backward.count(Z * dtype.itemsize) == 1


def test_layers_that_read_different_inputs_keep_a_z_each() -> None:
    layers = [trained_layer(IN, OUT, RANK) for _ in range(2)]
    x = randn(TOKENS, IN, seed=0).requires_grad_()
    kept = Kept(lambda: sum(layer(1 * x).sum() for layer in layers))
    assert kept.until_backward.count(4 * Z) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_without_gradients_keeps_its_last_input_at_most(mode: Callable[[], object]) -> None:
    layer, x = trained_layer(IN, OUT, RANK), randn(TOKENS, IN, seed=0)
    with mode():
        layer(x)
        with Census() as census:
            layer(1 * x)
    assert sum(census.held()) <= SMALL + (4 * INPUTS if mode is torch.no_grad else 0)


def test_a_layer_in_evaluation_keeps_nothing() -> None:
    layer, x = trained_layer(IN, OUT, RANK).eval(), randn(TOKENS, IN, seed=0)
    layer(x)
    with Census() as census:
        y = layer(1 * x)
    assert sum(census.held([y])) <= (OUTPUTS + Z) * 4 + SMALL
    with torch.no_grad(), census:
        y = layer(1 * x)
    assert sum(census.held([y])) <= SMALL


def test_a_graph_that_is_never_run_backward_does_not_keep_what_the_layer_forgot() -> None:
    layer, x = trained_layer(IN, OUT, RANK), randn(TOKENS, IN, seed=0)
    layer(x)
    with Census() as census:
        y = layer(1 * x)
        before = sum(census.held([y]))
        layer.reset_state()
        assert sum(census.held([y])) == before - 4 * INPUTS


@both_checkpoints
def test_a_checkpointed_part_keeps_nothing_but_its_input(use_reentrant: bool) -> None:
    layers = nn.Sequential(*(trained_layer(IN, IN, RANK) for _ in range(4)))
    x = randn(TOKENS, IN, seed=0).requires_grad_()
    kept = Kept(lambda: checkpoint(layers, 1 * x, use_reentrant=use_reentrant).sum())
    assert sum(kept.until_backward) <= 4 * INPUTS + 4 * SMALL
    assert sum(kept.behind) <= 4 * SMALL


def test_the_second_run_of_a_checkpointed_part_keeps_no_inputs() -> None:
    layers, x = [trained_layer(IN, IN, RANK) for _ in range(4)], randn(TOKENS, IN, seed=0).requires_grad_()

    def part(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        held.append(sum(census.held([x])))
        return x

    held: list[int] = []
    with Census() as census:
        checkpoint(part, 1 * x, use_reentrant=True).sum().backward()
    first, second = held
    assert first <= 4 * INPUTS + SMALL
    assert second <= 4 * INPUTS + 4 * (4 * (INPUTS + Z) + SMALL)


def test_a_trained_base_is_seen_to_keep_the_inputs() -> None:
    base = linear(IN, OUT)
    layer = train(DVoRAAdapter(base, RANK, freeze_base_layer=False, shared=SHARED))
    x = randn(TOKENS, IN, seed=0)
    assert 4 * INPUTS in Kept(lambda: layer(1 * x).sum()).until_backward


class Hoarder(nn.Module):
    """Keeps its input where nobody looks."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.weight = where, nn.Parameter(torch.ones(IN))

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "attribute":
            self.last = x
        elif self.where == "closure":
            self.register_forward_hook(lambda *_: x.shape and None)
        return x * self.weight.detach() + self.weight


@pytest.mark.parametrize(("where", "seen"), [("attribute", True), ("closure", True), ("nowhere", False)])
def test_the_instrument_sees_what_is_kept_outside_of_autograd(where: str, seen: bool) -> None:
    hoarder, x = Hoarder(where), randn(TOKENS, IN, seed=0)
    kept = Kept(lambda: hoarder(1 * x).sum())
    assert (4 * INPUTS in kept.behind) is seen
