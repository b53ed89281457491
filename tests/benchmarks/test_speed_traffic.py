"""Operations and bytes of steps that can be worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from benchmarks.speed.traffic import Traffic, traffic

A, B, ROW = torch.ones(2, 3), torch.ones(3, 5), torch.ones(5)


@pytest.mark.parametrize(
    ("step", "operations", "values"),
    [
        pytest.param(lambda: A @ B, 2 * 2 * 3 * 5, 6 + 15 + 10, id="a product"),
        pytest.param(lambda: A + A, 0, 6 + 6 + 6, id="a sum"),
        pytest.param(lambda: ROW.expand(4, 5) * 2, 0, 5 + 20, id="a row for all tokens"),
        pytest.param(lambda: torch.mm(A, B, out=torch.empty(2, 5)), 60, 6 + 15 + 10, id="into known memory"),
        pytest.param(lambda: B.T, 0, 0, id="a view"),
        pytest.param(lambda: torch.empty(9), 0, 0, id="reserved memory"),
    ],
)
def test_counts_are_those_of_the_definition(step: Callable[[], object], operations: int, values: int) -> None:
    assert traffic(step) == Traffic(operations, 4 * values)


def test_half_the_bytes_in_half_precision() -> None:
    assert traffic(lambda: A.bfloat16() @ B.bfloat16()).bytes == 6 * 6 + 15 * 6 + 2 * (6 + 15 + 10)


def test_a_backward_pass_counts_with_its_forward() -> None:
    layer, x = nn.Linear(3, 5, bias=False).requires_grad_(False), torch.ones(2, 3, requires_grad=True)
    of_forward = traffic(lambda: layer(x)).operations
    assert traffic(lambda: layer(x).sum().backward()).operations == 2 * of_forward
