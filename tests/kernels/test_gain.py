"""The gain of a frozen weight with its gradients in closed form, against the dense float64 method."""

import pytest
import torch
from cases import DIRECTIONS, LARGE_SIZES, SIZES, TOLERANCE, randn
from checked import checked
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from reference import DenseDVoRA, worst_error
from torch import Tensor

from dvora import SharedProjections
from dvora import functional as F
from dvora.kernels.gain import gain_minus_one
from dvora.norms import FrozenNorm, cross_matrix
from dvora.projections import DISTRIBUTIONS

NAMES = ("magnitude", "lambda_b", "lambda_d")

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
with_or_without_C = pytest.mark.parametrize("keep_C", [True, False], ids=["C kept", "C made again"])


class Problem:
    """One frozen weight and its trained vectors."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dtype: torch.dtype = torch.float64,
        distribution: str = "kaiming_uniform",
        skipped_column: int | None = None,
        scaling: float = 1.0,
        direction: str = "unit",
        detach_norm: bool = False,
    ) -> None:
        self.shared = SharedProjections(5, distribution)
        self.weight = randn(out_features, in_features, seed=0, dtype=dtype)
        self.skipped_column, self.scaling, self.direction, self.detach_norm = (
            skipped_column,
            scaling,
            direction,
            detach_norm,
        )
        self.vectors = F.Vectors(
            F.row_norm(self.weight) * (0.5 + randn(out_features, seed=4, dtype=dtype).abs()),
            randn(out_features, seed=5, dtype=dtype),
            0.3 * randn(rank, seed=6, dtype=dtype),
        )
        self.loss_gradient = randn(out_features, seed=7, dtype=dtype)

    @property
    def A(self) -> Tensor:
        A = self.shared.A(len(self.vectors.lambda_d), self.weight.shape[1], torch.float64)
        if self.skipped_column is not None:
            A[:, self.skipped_column] = 0
        return A

    @property
    def B(self) -> Tensor:
        return self.shared.B(len(self.vectors.lambda_d), len(self.weight), torch.float64)

    def norm(self, keep_C: bool = True, keep_weight: bool = True) -> FrozenNorm:
        rank, dtype = len(self.vectors.lambda_d), self.weight.dtype
        C = cross_matrix(self.weight, self.shared, rank, self.skipped_column, dtype) if keep_C else None
        matrix = self.weight if keep_weight else None
        w = F.row_norm(self.weight)
        return FrozenNorm(w, C, matrix, self.shared, self.weight.shape[1], rank, self.skipped_column)

    def beta(self) -> Tensor:
        return F.row_scale(self.vectors.lambda_b, F.row_norm(self.weight), self.scaling, self.direction)

    def gain_minus_one(self, norm: FrozenNorm | None = None) -> Tensor:
        return gain_minus_one(self.vectors, norm or self.norm(), self.beta(), self.detach_norm)

    def gradients(self, norm: FrozenNorm | None = None) -> dict[str, Tensor]:
        for vector in self.vectors:
            vector.requires_grad_()
        found = torch.autograd.grad(
            self.gain_minus_one(norm), self.vectors, self.loss_gradient, materialize_grads=True, allow_unused=True
        )
        return dict(zip(NAMES, found, strict=True))

    def dense(self) -> DenseDVoRA:
        options = {"scaling": self.scaling, "direction": self.direction, "detach_norm": self.detach_norm}
        return DenseDVoRA(self.weight, None, self.A, self.B, *self.vectors, **options)

    def dense_gradients(self) -> dict[str, Tensor]:
        dense = self.dense()
        wanted = [dense.get_parameter(name) for name in NAMES]
        found = torch.autograd.grad(
            dense.gain(), wanted, self.loss_gradient.double(), materialize_grads=True, allow_unused=True
        )
        return dict(zip(NAMES, found, strict=True))

    def cancel(self, ratio: float, rows: list[int]) -> "Problem":
        """Let the update cancel some rows but for about `ratio` of their length."""
        update = self.scaling * (self.B * self.vectors.lambda_d.double()) @ self.A
        size = update.norm(dim=1, keepdim=True)
        rest = torch.nn.functional.normalize(self.weight.double(), dim=1)
        self.weight[rows] = (-update / size + ratio * rest)[rows].to(self.weight.dtype)
        w = F.row_norm(self.weight)
        # The rest keeps its part along the update: without one, the gradient of beta would have no digits.
        lambda_b = 1 / size[:, 0].to(w.dtype) / (w if self.direction == "unit" else 1.0)
        self.vectors.lambda_b[rows] = lambda_b[rows]
        return self


def assert_equal_to_the_dense_method(p: Problem, tolerance: float, norm: FrozenNorm | None = None) -> None:
    norm = norm or p.norm()
    assert worst_error(p.gain_minus_one(norm), p.dense().gain() - 1) < tolerance
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
@with_or_without_C
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
)
def test_any_shape_equals_the_dense_method(
    shape: tuple[int, int, int], skipped: bool, keep_C: bool, **options: object
) -> None:
    p = Problem(*shape, skipped_column=1 if skipped else None, **options)
    assert_equal_to_the_dense_method(p, 1e-12, p.norm(keep_C))


@every_distribution
@with_or_without_C
@pytest.mark.parametrize("rank", [3, 20], ids=lambda rank: f"rank {rank}")
def test_a_column_that_the_update_skips_equals_the_dense_method(rank: int, keep_C: bool, distribution: str) -> None:
    p = Problem(6, 9, rank, distribution=distribution, skipped_column=4)
    assert_equal_to_the_dense_method(p, 1e-12, p.norm(keep_C))


@both_directions
@every_distribution
def test_zero_rows_equal_the_dense_method(direction: str, distribution: str) -> None:
    p = Problem(6, 5, 3, distribution=distribution, direction=direction)
    p.weight[[0, 3]] = 0
    assert not p.gain_minus_one()[[0, 3]].any()
    assert_equal_to_the_dense_method(p, 1e-12)
    assert not p.gradients()["lambda_b"][[0, 3]].any()


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


def test_a_nearly_cancelled_row_leaves_out_the_skipped_column() -> None:
    p = Problem(16, 6, 4, skipped_column=3).cancel(1e-3, [1])
    assert_equal_to_the_dense_method(p, 1e-11)


@every_distribution
@pytest.mark.parametrize("keep_weight", [True, False], ids=["weight at hand", "weight not at hand"])
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
    norm = norm._replace(C=1.01 * norm.C)  # as coarse as bfloat16: the squared norm comes out negative
    gradients = p.gradients(norm)
    plain = torch.autograd.grad(F.gain_minus_one(p.vectors, norm, p.beta()), p.vectors, p.loss_gradient)
    assert gradients["lambda_b"][1] == 0
    for name, expected in zip(NAMES, plain, strict=True):
        assert worst_error(gradients[name], expected) < TOLERANCE[dtype], name


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
@with_or_without_C
def test_without_training_the_gain_is_exactly_one(
    keep_C: bool, distribution: str, direction: str, dtype: torch.dtype
) -> None:
    p = Problem(7, 5, 3, dtype, distribution, direction=direction)
    p.vectors = p.vectors._replace(magnitude=F.row_norm(p.weight), lambda_b=torch.zeros(5, dtype=dtype))
    assert not p.gain_minus_one(p.norm(keep_C)).any()


def test_the_gain_is_the_one_of_the_pure_functions_to_the_last_bit() -> None:
    for dtype in TOLERANCE:
        p = Problem(7, 5, 3, dtype)
        assert torch.equal(p.gain_minus_one(), F.gain_minus_one(p.vectors, p.norm(), p.beta()))


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
    norm = FrozenNorm(w, None, p.weight, p.shared, 7, 0, None)
    assert worst_error(p.gain_minus_one(norm), p.vectors.magnitude / w - 1) < 1e-12
    gradients = p.gradients(norm)
    assert worst_error(gradients["magnitude"], p.loss_gradient / w) < 1e-12
    assert not gradients["lambda_b"].any()
    assert gradients["lambda_d"].shape == (0,)


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    p = Problem(7, 5, 3)
    with pytest.raises(TypeCheckError):
        checked("kernels.gain").gain_minus_one(p.vectors, p.norm(), p.beta()[None])
