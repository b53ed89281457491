"""Kernels are counted right where they can be counted by hand."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.kernel_count import kernels

X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: X + 1, {"aten.add.Tensor": 1}),
        (lambda: X.T.mm(X).add_(1), {"aten.mm.default": 1, "aten.add_.Tensor": 1}),
        # Looking at a tensor in another way, or at a part of it.
        (lambda: (X.view(2, 12), X.T, X[1:], X.unbind(), X.detach(), X.expand(3, 4, 6), X[None].squeeze(0)), {}),
        (lambda: torch.empty(3).resize_(2).unsqueeze_(0).squeeze_(0), {}),
        (lambda: (X.new_empty(2), torch.empty_like(X)), {}),
        # Reserving memory is none, filling it is one.
        (lambda: torch.zeros(3), {"aten.zeros.default": 1}),
        (lambda: X.T.contiguous(), {"aten.clone.default": 1}),
        (lambda: X.sum().item(), {"aten.sum.default": 1, "aten._local_scalar_dense.default": 1}),
    ],
)
def test_what_starts_a_kernel_is_counted(step: Callable[[], object], expected: dict[str, int]) -> None:
    assert kernels(step) == Counter(expected)


def test_the_backward_pass_is_counted_with_it() -> None:
    layer = nn.Linear(6, 3, bias=False)

    def step() -> None:
        y: Tensor = layer(X)
        y.backward(torch.ones(4, 3))

    step()
    layer.weight.grad = None
    # The product, its gradient of ones, and the product for the weight's gradient.
    assert kernels(step) == Counter({"aten.mm.default": 2, "aten.ones.default": 1})
