"""Factors of one layer packed for token functions: for a batch, stacked for adapters, gathered for rows."""

import pytest
import torch
from jaxtyping import TypeCheckError

from tests.cases import randn
from tests.checked import checked

packed_factors = checked("method.packed_factors")
PackedFactors, constant_factors = packed_factors.PackedFactors, packed_factors.constant_factors
F = checked("method.functional")
OUT, RANK = 5, 3


def packed(seed: int) -> PackedFactors:
    gain_minus_one, scale = randn(OUT, seed=seed), randn(OUT, seed=seed + 1)
    return PackedFactors.of(F.RowFactors(gain_minus_one, scale, 1 + gain_minus_one), randn(RANK, seed=seed + 2))


def test_separate_tensors_come_back_as_they_were() -> None:
    gain_minus_one, scale, gain = (randn(OUT, seed=seed) for seed in range(3))
    made = PackedFactors.of(F.RowFactors(gain_minus_one, scale, gain), randn(RANK, seed=3))
    assert all(map(torch.equal, made.rows, (gain_minus_one, scale, gain)))
    assert torch.equal(made.constant[1], -gain_minus_one)
    assert not made.is_by_row


def test_constants_have_no_gradient() -> None:
    gain_minus_one = randn(OUT, seed=0).requires_grad_()
    made = PackedFactors.of(F.RowFactors(gain_minus_one, gain_minus_one, 1 + gain_minus_one), randn(RANK, seed=1))
    assert made.trained.requires_grad
    assert not made.constant.requires_grad


def every_adapter(count: int) -> PackedFactors:
    """Of several adapters, one after another."""
    adapters = [packed(10 * number) for number in range(count)]
    trained, lambda_d = (torch.stack([one.trained for one in adapters], 1), torch.stack([a.lambda_d for a in adapters]))
    return PackedFactors(trained, None, lambda_d)


@pytest.mark.parametrize("way", ["gathered", "as rows of a matrix"])
@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_the_factors_of_rows_are_those_of_their_adapters(dimensions: int, way: str) -> None:
    index = torch.tensor([2, 0, 2, 1])
    if way == "gathered":
        rows = every_adapter(3).gathered(index, dimensions)
    else:
        matrix = torch.stack([packed(10 * number).row for number in index.tolist()])
        rows = PackedFactors.of_rows(matrix, RANK, dimensions)
    ones = (1,) * (dimensions - 2)
    assert rows.is_by_row
    assert rows.trained.shape == (2, 4, *ones, OUT)
    assert rows.lambda_d.shape == (4, *ones, RANK)
    bias = randn(OUT, seed=7)
    for row, number in enumerate(index.tolist()):
        own = packed(10 * number)
        assert torch.equal(rows.trained[:, row].flatten(), own.trained.flatten())
        assert torch.equal(rows.lambda_d[row].flatten(), own.lambda_d)
        torch.testing.assert_close(rows.gain[row].flatten(), own.gain)
        torch.testing.assert_close(rows.offset(bias)[row].flatten(), own.offset(bias))
    tokens = randn(4, *(2,) * (dimensions - 2), OUT, seed=5)
    assert (tokens * rows.gain).shape == tokens.shape


def test_gradients_of_gathered_rows_are_added_by_adapter() -> None:
    adapters = every_adapter(3)
    trained, lambda_d = adapters.trained.requires_grad_(), adapters.lambda_d.requires_grad_()
    rows = adapters.gathered(torch.tensor([2, 0, 2]), 3)
    (rows.trained.sum() + rows.lambda_d.sum()).backward()
    assert trained.grad[0, :, 0].tolist() == lambda_d.grad[:, 0].tolist() == [1, 0, 2]


def test_gradients_of_a_matrix_of_rows_reach_it() -> None:
    matrix = torch.stack([packed(0).row, packed(10).row]).requires_grad_()
    rows = PackedFactors.of_rows(matrix, RANK, 3)
    (rows.trained.sum() + 2 * rows.lambda_d.sum()).backward()
    assert matrix.grad.tolist() == [[1] * 2 * OUT + [2] * RANK] * 2
    assert not rows.gain.requires_grad
    assert not rows.offset(torch.ones(OUT)).requires_grad


def test_a_row_of_zeros_is_the_base_and_changes_nothing() -> None:
    base = PackedFactors.of_rows(torch.zeros(1, 2 * OUT + RANK), RANK, 2)
    assert base.gain.eq(1).all()
    assert not base.offset(randn(OUT, seed=0)).any()


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_weaker_factors_are_those_of_a_part_of_the_change(strength: float) -> None:
    made = packed(0)
    weaker = made.weakened(torch.tensor(strength))
    torch.testing.assert_close(weaker.trained, strength * made.trained)
    torch.testing.assert_close(weaker.constant[0], 1 + strength * (made.constant[0] - 1))
    assert torch.equal(weaker.constant[1], -weaker.trained[0])
    if strength == 1:
        assert all(map(torch.equal, weaker, made))
    if strength == 0:
        assert not weaker.trained.any()
        assert weaker.constant[0].eq(1).all()


def test_factors_of_a_magnitude_only_have_no_lambda_d() -> None:
    made = packed(0)._replace(lambda_d=torch.empty(0))
    rows = PackedFactors.of_rows(torch.stack([made.row] * 3), 0, 3)
    assert rows.lambda_d.shape == (3, 1, 0)
    assert rows.is_by_row


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    with pytest.raises(TypeCheckError):
        constant_factors(torch.zeros(2), None)
