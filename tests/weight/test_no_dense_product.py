"""What a step makes that is as large as the weight, once the constants of the norm exist.

Nothing, but for the updated weight where dense matrices are trained with many tokens (`takes_updated_weight`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvora import DVoRAAdapter, SharedProjections
from tests.cases import DIRECTIONS, randn, trained_layer
from tests.reference import DenseDVoRA

OUT, IN, RANK = 60, 50, 4
FEW, MANY = 8, 410
"""Tokens, for which training takes the thin products and, with dense matrices of float32, the updated weight."""


class NewTensors(TorchDispatchMode):
    """Records the operations that return new memory for as many values as the weight has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            new = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known
            if new and tensor.numel() == OUT * IN:
                self.found.append(f"{func} -> {tuple(tensor.shape)}")
        return result


def dense_tensors(step: Callable[[], object]) -> list[str]:
    """What makes a tensor of OUT x IN values in the second of two steps: the first may make the constants."""
    step()
    with NewTensors() as made:
        step()
    return made.found


def autograd_step(layer: torch.nn.Module, dtype: torch.dtype, tokens: int = FEW) -> None:
    x = randn(tokens, IN, seed=0, dtype=dtype).requires_grad_()
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


def explicit_step(layer: DVoRAAdapter, dtype: torch.dtype, tokens: int = FEW) -> None:
    layer.backward(layer(randn(tokens, IN, seed=0, dtype=dtype)).detach())
    layer.update_parameters(0.01)


@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", [autograd_step, explicit_step])
def test_a_training_step_makes_nothing_dense(
    step: Callable[[DVoRAAdapter, torch.dtype], None], dtype: torch.dtype, direction: str, detach_norm: bool
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, direction=direction, detach_norm=detach_norm)
    assert dense_tensors(lambda: step(layer, dtype)) == []


# The explicit form passes forward a second time.
@pytest.mark.parametrize(("step", "passes"), [(autograd_step, 2), (explicit_step, 3)])
@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_many_tokens_only_dense_matrices_of_full_precision_make_the_updated_weight_once_a_pass(
    dtype: torch.dtype, distribution: str, step: Callable[[DVoRAAdapter, torch.dtype, int], None], passes: int
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, shared=SharedProjections(3, distribution))
    made = dense_tensors(lambda: step(layer, dtype, MANY))
    if dtype == torch.float32 and distribution == "kaiming_uniform":
        assert [operation.partition(" ")[0] for operation in made] == ["aten.addmm.default"] * passes
    else:
        assert made == []


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_evaluation_and_diagnostics_make_nothing_dense(tokens: int) -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    x = randn(tokens, IN, seed=0)
    with torch.no_grad():
        assert dense_tensors(lambda: (layer(x), layer.diagnostics())) == []


def test_the_dense_method_does() -> None:
    dense = DenseDVoRA.of(trained_layer(IN, OUT, RANK))
    assert dense_tensors(lambda: autograd_step(dense, torch.float64))


def test_a_merge_does() -> None:
    assert dense_tensors(trained_layer(IN, OUT, RANK).merge_to_original_layer)
