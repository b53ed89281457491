"""The gain of a frozen weight with its gradients in closed form, against the dense float64 method."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import DIRECTIONS, LARGE_SIZES, SIZES, TOLERANCE, randn
from tests.method.frozen_weight import (
    NAMES,
    F,
    FrozenNorm,
    Problem,
    both_directions,
    both_dtypes,
    c_kept_or_not,
    every_distribution,
    row_factors,
)
from tests.reference import worst_error


def assert_equal_to_the_dense_method(p: Problem, tolerance: float, norm: FrozenNorm | None = None) -> None:
    norm = norm or p.norm()
    factors, dense = p.factors(norm), p.dense()
    assert worst_error(factors.gain_minus_one, dense.gain() - 1) < tolerance
    assert worst_error(factors.gain, dense.gain()) < tolerance
    assert worst_error(factors.scale, dense.scale()) < tolerance
    ours, expected = p.gradients(norm), p.dense_gradients()
    if p.weight.shape[1] == 1 and not p.detach_norm:
        # A row of one value has no direction: these vanish, and their rounding errors have nothing to be relative to.
        del expected["lambda_b"], expected["lambda_d"]
    for name, gradient in expected.items():
        assert worst_error(ours[name], gradient) < tolerance, name


@both_dtypes
@both_directions
@every_distribution
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES)
def test_gain_and_gradients_equal_the_dense_method(
    in_features: int,
    out_features: int,
    rank: int,
    detach_norm: bool,
    distribution: str,
    direction: str,
    dtype: torch.dtype,
) -> None:
    options = {"scaling": 0.25, "direction": direction, "detach_norm": detach_norm}
    p = Problem(in_features, out_features, rank, dtype, distribution, **options)
    for norm in (p.norm(), p.norm(keep_C=False), p.norm(keep_weight=False)):
        assert_equal_to_the_dense_method(p, TOLERANCE[dtype], norm)


@both_dtypes
@every_distribution
@c_kept_or_not
@pytest.mark.parametrize(("in_features", "out_features", "rank"), LARGE_SIZES)
def test_gain_and_gradients_of_large_layers_equal_the_dense_method(
    in_features: int, out_features: int, rank: int, dtype: torch.dtype, distribution: str, keep_C: bool
) -> None:
    p = Problem(in_features, out_features, rank, dtype, distribution)
    assert_equal_to_the_dense_method(p, TOLERANCE[dtype], p.norm(keep_C))


@given(
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 12)),
    distribution=st.sampled_from(DISTRIBUTIONS),
    scaling=st.floats(0.01, 10),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
    skipped=st.booleans(),
    keep_C=st.booleans(),
    handed_on=st.booleans(),
)
def test_any_shape_equals_the_dense_method(
    shape: tuple[int, int, int], skipped: bool, keep_C: bool, handed_on: bool, **options: object
) -> None:
    p = Problem(*shape, padding_column=1 if skipped else None, **options)
    if handed_on:
        p.lambda_gradient = randn(shape[2], seed=9, dtype=torch.float64)
    assert_equal_to_the_dense_method(p, 1e-12, p.norm(keep_C))


@every_distribution
@c_kept_or_not
@pytest.mark.parametrize("rank", [3, 20], ids=lambda rank: f"rank {rank}")
def test_a_column_that_the_update_skips_equals_the_dense_method(rank: int, keep_C: bool, distribution: str) -> None:
    p = Problem(6, 9, rank, distribution=distribution, padding_column=4)
    assert_equal_to_the_dense_method(p, 1e-12, p.norm(keep_C))


@both_directions
@every_distribution
def test_zero_rows_equal_the_dense_method(direction: str, distribution: str) -> None:
    p = Problem(6, 5, 3, distribution=distribution, direction=direction)
    p.weight[[0, 3]] = 0
    assert not p.gain_minus_one()[[0, 3]].any()
    assert_equal_to_the_dense_method(p, 1e-12)
    p.scale_gradient.zero_()
    gradients = p.gradients()
    assert not gradients["lambda_b"][[0, 3]].any()
    assert not gradients["magnitude"][[0, 3]].any()


@both_dtypes
def test_that_rows_may_be_zero_changes_no_bit_where_none_is(dtype: torch.dtype) -> None:
    p = Problem(6, 5, 3, dtype)
    norm, careful = p.norm(), p.norm()._replace(zero_rows=True)
    assert not norm.zero_rows
    for found, expected in zip(p.factors(careful), p.factors(norm), strict=True):
        assert torch.equal(found, expected)
    ours, expected = p.gradients(careful), p.gradients(norm)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


def test_a_weight_of_zeros_has_a_gain_of_one_and_no_gradient() -> None:
    p = Problem(6, 5, 3)
    p.weight.zero_()
    p.vectors.magnitude.fill_(0.7)
    assert not p.gain_minus_one().any()
    assert not any(gradient.any() for gradient in p.gradients().values())


@both_dtypes
@both_directions
@every_distribution
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_nearly_cancelled_rows_of_a_weight_at_hand_are_exact_to_conditioning(
    ratio: float, detach_norm: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    if dtype == torch.float32 and ratio < 1e-2:
        pytest.skip("a difference of float32 values has no digits left")
    p = Problem(16, 6, 4, dtype, distribution, direction=direction, detach_norm=detach_norm).cancel(ratio, [0, 2, 5])
    assert p.dense().norm_ratio()[[0, 2, 5]].max() < 3 * ratio
    for keep_C in (True, False):
        # Rounding of beta alone moves a row that is n / w times shorter by eps * w / n.
        assert_equal_to_the_dense_method(p, 40 * torch.finfo(dtype).eps / ratio, p.norm(keep_C))


def test_a_nearly_cancelled_row_leaves_out_the_padding_column() -> None:
    p = Problem(16, 6, 4, padding_column=3).cancel(1e-3, [1])
    assert_equal_to_the_dense_method(p, 1e-11)


@every_distribution
@pytest.mark.parametrize("keep_weight", [True, False], ids=["weight in memory", "weight not in memory"])
def test_a_row_that_vanishes_altogether_has_a_finite_gain_and_finite_gradients(
    keep_weight: bool, distribution: str
) -> None:
    p = Problem(4, 3, 2, distribution=distribution)
    p.vectors = F.Vectors(*(torch.tensor(values, dtype=torch.float64) for values in ([5.0] * 3, [1.0] * 3, [1.0, 0.0])))
    p.direction = "weight"
    p.weight = -(p.B * p.vectors.lambda_d) @ p.A
    norm = p.norm(keep_weight=keep_weight)
    assert p.gain_minus_one(norm).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in p.gradients(norm).values())


@both_dtypes
def test_a_row_whose_terms_are_nothing_but_rounding_has_no_gradient_through_the_norm(dtype: torch.dtype) -> None:
    p = Problem(16, 6, 4, dtype).cancel(1e-2, [1])
    norm = p.norm(keep_weight=False)
    p.scale_gradient.zero_()
    norm = norm._replace(C=1.01 * norm.C)  # as coarse as bfloat16: the squared norm comes out negative
    gradients = p.gradients(norm)
    assert gradients["magnitude"][1].isfinite()
    assert gradients["lambda_b"][1] == 0
    p.loss_gradient[1] = 0
    without = p.gradients(norm)
    assert torch.equal(gradients["lambda_d"], without["lambda_d"])
    assert torch.equal(gradients["lambda_b"], without["lambda_b"])


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
@every_distribution
def test_gain_minus_one_keeps_its_digits_in_float32(size: float, distribution: str) -> None:
    p = Problem(7, 5, 3, torch.float32, distribution)
    p.vectors = F.Vectors(F.row_norm(p.weight), size * p.vectors.lambda_b, p.vectors.lambda_d)
    dense = p.dense()
    # The magnitude is the float32 row norm: the distance of that from the true one is not what is tested here.
    expected = dense.gain() * p.weight.double().norm(dim=1) / dense.magnitude - 1
    assert worst_error(p.gain_minus_one(), expected) < 1e-5


@both_dtypes
@both_directions
@every_distribution
@c_kept_or_not
def test_without_training_the_gain_is_exactly_one(
    keep_C: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    p = Problem(7, 5, 3, dtype, distribution, direction=direction)
    p.vectors = p.vectors._replace(magnitude=F.row_norm(p.weight), lambda_b=torch.zeros(5, dtype=dtype))
    assert not p.gain_minus_one(p.norm(keep_C)).any()


@both_dtypes
@both_directions
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e6])
def test_the_factors_are_those_of_the_pure_functions_to_a_few_roundings(
    size: float, direction: str, dtype: torch.dtype
) -> None:
    p = Problem(7, 5, 3, dtype, direction=direction)
    p.weight[2] = 0
    p.vectors.lambda_b.mul_(size)
    expected = F.row_factors(p.vectors, p.norm(), p.beta())
    for found, value in zip(p.factors(), expected, strict=True):
        assert worst_error(found, value.double()) < 10 * torch.finfo(dtype).eps


@both_dtypes
def test_a_gain_and_its_distance_from_one_agree_where_the_norm_is_at_its_floor(dtype: torch.dtype) -> None:
    p = Problem(16, 6, 4, dtype).cancel(1e-2, [1])
    norm = p.norm(keep_weight=False)
    # As coarse as bfloat16: the squared norm comes out negative.
    factors = p.factors(norm._replace(C=1.01 * norm.C))
    assert worst_error(1 + factors.gain_minus_one, factors.gain.double()) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_in_half_precision_have_a_norm_in_float32(half: torch.dtype) -> None:
    p, wide = Problem(7, 5, 3, torch.float32), Problem(7, 5, 3, torch.float32)
    p.vectors = F.Vectors(*(vector.to(half) for vector in p.vectors))
    wide.vectors = p.vectors.to(torch.float32)
    for found, expected in zip(p.factors(), wide.factors(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    ours, expected = p.gradients(), wide.gradients()
    for name in NAMES:
        assert ours[name].dtype == half
        assert torch.equal(ours[name], expected[name].to(half))


def test_a_C_in_bfloat16_is_widened_before_anything_is_summed() -> None:
    p = Problem(7, 5, 3, torch.float32)
    norm = p.norm(keep_weight=False)
    kept, widened = (norm._replace(C=norm.C.bfloat16().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(p.gain_minus_one(kept), p.gain_minus_one(widened))
    ours, expected = p.gradients(kept), p.gradients(widened)
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


def test_the_constants_may_be_those_of_a_weight_in_half_precision() -> None:
    p = Problem(7, 5, 3, torch.float32)
    p.weight = p.weight.bfloat16()
    norm = p.norm(keep_C=False)._replace(w=F.row_norm(p.weight))
    assert p.gain_minus_one(norm).dtype == torch.float32
    assert_equal_to_the_dense_method(p, 1e-5, norm)


def test_a_weight_of_which_only_the_rows_are_rescaled_has_gradients() -> None:
    p = Problem(7, 5, 3)
    p.vectors = p.vectors._replace(lambda_d=p.vectors.lambda_d[:0])
    w = F.row_norm(p.weight)
    norm = FrozenNorm(w, False, None, p.weight, p.shared.impl, 7, 0, None)
    p.scale_gradient.zero_()
    assert worst_error(p.gain_minus_one(norm), p.vectors.magnitude / w - 1) < 1e-12
    gradients = p.gradients(norm)
    assert worst_error(gradients["magnitude"], p.loss_gradient / w) < 1e-12
    assert not gradients["lambda_b"].any()
    assert gradients["lambda_d"].shape == (0,)


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    p = Problem(7, 5, 3)
    row_factors([p.vectors], [p.norm()], p.settings)
    with pytest.raises(TypeCheckError):
        p.norm().squares(p.vectors.magnitude[None], randn(3, 3, 5, seed=0, dtype=torch.float64))
    with pytest.raises(TypeCheckError):
        row_factors(p.vectors, p.norm(), p.settings)
