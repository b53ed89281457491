"""Products with stacks of Kronecker products against the dense matrix: factors, values, operations."""

from itertools import product

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


@given(size=st.integers(1, 3000))
def test_factors_of_a_size_are_its_divisors_next_to_the_root(size: int) -> None:
    n1, n2 = kronecker.factors_of_size(size)
    assert n1 * n2 == size
    assert n1 <= n2
    assert not any(size % divisor == 0 for divisor in range(n1 + 1, int(size**0.5) + 1))


@given(n1=st.integers(1, 40), more=st.integers(0, 60), data=st.data())
def test_factors_of_rows_have_the_fewest_operations(n1: int, more: int, data: st.DataObject) -> None:
    n2 = n1 + more
    rows = data.draw(st.integers(1, n1 * n2))

    def cost(r1: int, r2: int) -> int:
        width = min(16 * -(-r2 // 16), n2)
        return n1 * n2 * width + n1 * r1 * width

    r1, r2 = kronecker.factors_of_rows(rows, n1, n2)
    assert r1 <= n1
    assert r2 <= n2
    assert rows <= r1 * r2 < rows + r2
    others = [pair for pair in product(range(1, n1 + 1), range(1, n2 + 1)) if pair[0] * pair[1] >= rows]
    assert cost(r1, r2) == min(cost(*pair) for pair in others)


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


@given(rows=SIZES, size=SIZES, data=st.data())
def test_columns_side_by_side_are_a_stack_unless_they_split_a_block(rows: int, size: int, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
    matrices, (_, n2) = stack(rows, size), kronecker.factors_of_size(size)
    part = matrices.slice(start, stop)
    assert (part is None) == bool(start % n2 or stop % n2)
    if part is not None:
        assert worst_error(part.dense(), naive(matrices)[:, start:stop]) < 1e-14
