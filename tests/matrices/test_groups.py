"""lambda_d by groups of columns: which column is in which group, the scaled matrix, and sums over groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvora.matrices.groups import Groups
from tests.cases import randn

sizes = st.integers(1, 30).flatmap(lambda columns: st.tuples(st.just(columns), st.integers(1, columns)))


@given(sizes)
def test_groups_are_consecutive_of_about_one_size_and_none_is_empty(sizes: tuple[int, int]) -> None:
    columns, groups = sizes
    group = Groups(groups, columns).group_of(torch.arange(columns)).tolist()
    assert group == [column * groups // columns for column in range(columns)]
    counts = [group.count(index) for index in range(groups)]
    assert group == sorted(group)
    assert max(counts) - min(counts) <= 1
    assert min(counts) >= 1
    bounds = Groups(groups, columns).bounds()
    assert [index for index, (first, stop) in enumerate(bounds) for _ in range(first, stop)] == group


@pytest.mark.parametrize("leading", [(), (3,)], ids=["one adapter", "three"])
@given(sizes, st.integers(1, 4))
def test_columns_are_scaled_and_summed_by_their_groups(
    leading: tuple[int, ...], sizes: tuple[int, int], rank: int
) -> None:
    columns, groups = sizes
    of = Groups(groups, columns)
    A = randn(rank, columns, seed=0, dtype=torch.float64)
    lambda_d = randn(*leading, groups * rank, seed=1, dtype=torch.float64).requires_grad_()
    by_column = lambda_d.view(*leading, groups, rank)[..., [i * groups // columns for i in range(columns)], :]
    expected = A * by_column.mT
    assert torch.equal(of.scaled(A, lambda_d), expected)
    weight = randn(*leading, rank, columns, seed=2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), lambda_d)
    torch.testing.assert_close(of.sums(A * weight), gradient, rtol=1e-12, atol=1e-12)
