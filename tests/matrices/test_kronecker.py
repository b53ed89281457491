"""Products with stacks of Kronecker products against the dense matrix: factors, values, operations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import randn
from tests.checked import checked
from tests.reference import worst_error

kronecker = checked("matrices.structured")
SIZES = st.integers(1, 40) | st.sampled_from([64, 97, 384])


def stack(rows: int, size: int):
    """Of normal values: nothing may rest on cosines and signs."""
    n1, n2 = kronecker.factors_of_size(size)
    blocks = []
    for index, part in enumerate(kronecker.block_rows(rows, size)):
        r1, r2 = kronecker.factors_of_rows(part, n1, n2)
        shapes = [(r1, n1), (r2, n2), (size,)]
        factors = [randn(*shape, seed=3 * index + i, dtype=torch.float64) for i, shape in enumerate(shapes)]
        blocks.append(kronecker.Kronecker(*factors, part))
    return kronecker.Stack(tuple(blocks))


def naive(matrices) -> Tensor:
    """The dense matrix, entry by entry of its definition."""
    blocks = []
    for left, right, diagonal, rows in matrices.blocks:
        block = torch.einsum("ai,bj->abij", left, right).reshape(len(left) * len(right), len(diagonal))
        blocks.append(block[:rows] * diagonal)
    return torch.cat(blocks)


@pytest.mark.parametrize(
    ("rows", "size", "factors"),
    [
        (256, 1024, (16, 16)),
        (1024, 1024, (32, 32)),
        (1024, 5632, (64, 16)),
        (7, 1024, (1, 7)),
        (100, 101, (1, 100)),
        (1, 1, (1, 1)),
        (101, 384, (7, 16)),
    ],
)
def test_factors_of_rows_are_pinned(rows: int, size: int, factors: tuple[int, int]) -> None:
    # Another choice is another matrix: a new format.
    assert kronecker.factors_of_rows(rows, *kronecker.factors_of_size(size)) == factors


@given(rows=SIZES, size=SIZES, tokens=st.integers(0, 3))
def test_products_take_the_operations_that_are_counted(rows: int, size: int, tokens: int) -> None:
    matrices = stack(rows, size)
    for function, width in ((matrices.narrow, size), (matrices.widen, rows)):
        with FlopCounterMode(display=False) as counter:
            function(randn(tokens, width, seed=0, dtype=torch.float64))
        of_products = kronecker.operations(rows, size) - size * len(matrices.blocks)
        assert counter.get_total_flops() == 2 * tokens * of_products


@given(rows=SIZES, size=SIZES, tokens=st.sampled_from([(), (0,), (1,), (3,), (2, 0), (2, 5)]), data=st.data())
def test_everything_equals_that_of_the_dense_matrix(
    rows: int, size: int, tokens: tuple[int, ...], data: st.DataObject
) -> None:
    matrices = stack(rows, size)
    M = naive(matrices)
    x, z = (randn(*tokens, n, seed=9, dtype=torch.float64) for n in (size, rows))
    assert worst_error(matrices.dense(), M) < 1e-14
    assert worst_error(matrices.narrow(x), x @ M.T) < 1e-12
    assert worst_error(matrices.widen(z), z @ M) < 1e-12
    assert worst_error(matrices.squared().dense(), M.square()) < 1e-14
    assert worst_error(matrices.to(torch.float32).dense(), M) < 1e-6
    index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2)))[:, None]
    assert torch.equal(matrices.columns(index), matrices.dense().T[index])
