"""A training step makes no tensor as large as the weight, once the constants of the norm exist."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIRECTIONS, randn, trained_layer
from reference import DenseDVoRA
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dvora import DVoRAAdapter

OUT, IN, RANK, TOKENS = 60, 50, 4, 8


class NewTensors(TorchDispatchMode):
    """Records the operations that return new memory for at least `least` values."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            new = isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known
            if new and tensor.numel() >= self.least:
                self.found.append(f"{func} -> {tuple(tensor.shape)}")
        return result


def dense_tensors(step: Callable[[], object]) -> list[str]:
    """What makes a tensor of OUT x IN values in the second of two steps: the first may make the constants."""
    step()
    with NewTensors(OUT * IN) as made:
        step()
    return made.found


def autograd_step(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    x = randn(TOKENS, IN, seed=0, dtype=dtype).requires_grad_()
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()


def explicit_step(layer: DVoRAAdapter, dtype: torch.dtype) -> None:
    layer.backward(layer(randn(TOKENS, IN, seed=0, dtype=dtype)).detach())
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


def test_evaluation_and_diagnostics_make_nothing_dense() -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    x = randn(TOKENS, IN, seed=0)
    assert dense_tensors(lambda: (layer(x), layer.diagnostics())) == []


def test_the_dense_method_does() -> None:
    dense = DenseDVoRA.of(trained_layer(IN, OUT, RANK))
    assert dense_tensors(lambda: autograd_step(dense, torch.float64))


def test_a_merge_does() -> None:
    assert dense_tensors(trained_layer(IN, OUT, RANK).merge_to_original_layer)
