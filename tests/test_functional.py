"""The method as pure functions, against the dense float64 method, with every shape annotation checked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from dvora import functional as unchecked
from tests.cases import DIRECTIONS, DTYPES, SIZES, TOLERANCE, randn
from tests.checked import checked
from tests.reference import DenseDVoRA, worst_error

F = checked("functional")

directions = pytest.mark.parametrize("direction", DIRECTIONS)
sizes = pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
NAMES = ("magnitude", "lambda_b", "lambda_d")


class Problem:
    """One adapted weight as plain tensors."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dtype: torch.dtype = torch.float64,
        groups: int | None = None,
        **options: object,
    ) -> None:
        self.weight = randn(out_features, in_features, seed=0, dtype=dtype)
        self.bias: Tensor | None = randn(out_features, seed=1, dtype=dtype)
        self.A = randn(rank, in_features, seed=2, dtype=dtype) * (2 / in_features) ** 0.5
        self.B = randn(out_features, rank, seed=3, dtype=dtype) * (2 / rank) ** 0.5
        self.vectors = F.Vectors(
            F.row_norm(self.weight) * (0.5 + randn(out_features, seed=4, dtype=dtype).abs()),
            randn(out_features, seed=5, dtype=dtype),
            0.3 * randn(*([] if groups is None else [groups]), rank, seed=6, dtype=dtype),
        )
        self.x = randn(2, 3, in_features, seed=7, dtype=dtype)
        self.options = options

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.A, self.B

    def outputs(self) -> Tensor:
        return F.dvora_linear(self.x, self.weight, self.bias, self.A, self.B, self.vectors, **self.options)

    def gain(self) -> Tensor:
        return F.gain(*self.matrices, self.vectors, **self.options)

    def factors(self) -> unchecked.RowFactors:
        w = F.row_norm(self.weight)
        cross, q = F.update_terms(*self.matrices[:1], w, self.A, self.B, self.vectors.lambda_d)
        return F.row_factors(self.vectors, w, cross, q, **self.options)

    def dense(self) -> DenseDVoRA:
        return DenseDVoRA(self.weight, self.bias, self.A, self.B, *self.vectors, **self.options)


@dtypes
@sizes
@given(
    scaling=st.floats(0.01, 10),
    direction=st.sampled_from(DIRECTIONS),
    leading=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    groups=st.sampled_from([None, 1, 2, 5, 300]),
)
def test_every_function_equals_the_dense_method(
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    leading: list[int],
    bias: bool,
    groups: int | None,
    **options: object,
) -> None:
    p = Problem(in_features, out_features, rank, dtype, groups and min(groups, in_features), **options)
    p.bias = p.bias if bias else None
    p.x = randn(*leading, in_features, seed=8, dtype=dtype)
    dense, tolerance = p.dense(), 5 * TOLERANCE[dtype]
    merged = F.merged_weight(*p.matrices, p.vectors, **options)
    delta = F.delta_weight(*p.matrices, p.vectors, **options)
    assert worst_error(p.gain(), dense.gain()) < tolerance
    assert worst_error(merged, dense.merged_weight()) < tolerance
    assert worst_error(delta, dense.merged_weight() - dense.weight) < tolerance
    assert worst_error(p.outputs(), dense(p.x)) < tolerance
    assert worst_error(p.factors().scale, dense.scale()) < tolerance


@directions
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("trained", ["vectors", "vectors and weight"])
def test_gradients_equal_those_of_the_dense_method(
    trained: str, groups: int | None, detach_norm: bool, direction: str
) -> None:
    p = Problem(6, 5, 3, groups=groups, detach_norm=detach_norm, direction=direction, scaling=0.5)
    p.weight[3] = 0
    leaves = {"x": p.x, "bias": p.bias, **p.vectors._asdict()}
    if trained != "vectors":
        leaves["weight"] = p.weight
    for leaf in leaves.values():
        leaf.requires_grad_()
    d = randn(2, 3, 5, seed=9, dtype=torch.float64)
    expected = p.dense().gradients(p.x, d)
    for name, gradient in zip(leaves, torch.autograd.grad(p.outputs(), [*leaves.values()], d), strict=True):
        if name == "weight":
            # The norm of a zero row has no derivative.
            gradient, expected[name] = gradient[:3], expected[name][:3]
        assert worst_error(gradient, expected[name]) < 1e-12, name


@directions
@pytest.mark.parametrize("groups", [None, 2])
def test_derivatives_of_every_order_equal_finite_differences(groups: int | None, direction: str) -> None:
    p = Problem(3, 4, 2, groups=groups, direction=direction, scaling=2.0)

    def outputs(x: Tensor, weight: Tensor, bias: Tensor, *vectors: Tensor) -> Tensor:
        return F.dvora_linear(x, weight, bias, p.A, p.B, F.Vectors(*vectors), **p.options)

    leaves = tuple(leaf.clone().requires_grad_() for leaf in (p.x[0], p.weight, p.bias, *p.vectors))
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@dtypes
@directions
def test_without_training_the_gain_is_exactly_one_and_the_delta_exactly_zero(
    direction: str, dtype: torch.dtype
) -> None:
    p = Problem(7, 5, 3, dtype, direction=direction)
    p.vectors = F.Vectors(F.row_norm(p.weight), torch.zeros(5, dtype=dtype), p.vectors.lambda_d)
    assert torch.equal(p.gain(), torch.ones(5, dtype=dtype))
    assert not F.delta_weight(*p.matrices, p.vectors, **p.options).any()
    assert torch.equal(F.merged_weight(*p.matrices, p.vectors, **p.options), p.weight)
    assert torch.equal(p.outputs(), torch.nn.functional.linear(p.x, p.weight, p.bias))


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_gain_minus_one_keeps_its_digits_in_float32(size: float) -> None:
    p = Problem(7, 5, 3, torch.float32)
    p.vectors = F.Vectors(F.row_norm(p.weight), size * p.vectors.lambda_b, p.vectors.lambda_d)
    ours, dense = p.factors().gain_minus_one, p.dense()
    # The magnitude is the float32 row norm: the distance of that from the true one is not what is tested here.
    expected = dense.gain() * p.weight.double().norm(dim=1) / dense.magnitude - 1
    assert worst_error(ours, expected) < 1e-5
    assert worst_error(1 + ours - 1, expected) > 1e-7 / size / 1e3, "the plain form would have done"


@directions
@pytest.mark.parametrize("size", [1e-3, 1e2, 1e5, 1e12])
def test_far_updates_in_every_second_row_keep_their_digits_in_float32(size: float, direction: str) -> None:
    p = Problem(24, 10, 4, torch.float32, direction=direction)
    p.vectors.lambda_b[::2] *= size
    dense = p.dense()
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert worst_error(p.factors().gain[rows], dense.gain()[rows]) < 1e-5
        assert worst_error(p.factors().scale[rows], dense.scale()[rows]) < 1e-5


@directions
@pytest.mark.parametrize("norm", [1e-3, 1e-12, 1e-18])
def test_a_row_of_tiny_norm_keeps_its_digits_in_float32(norm: float, direction: str) -> None:
    p = Problem(24, 10, 4, torch.float32, direction=direction)
    p.weight[3] *= norm / p.weight[3].norm()
    dense = p.dense()
    assert worst_error(p.factors().scale[3:4], dense.scale()[3:4]) < 1e-5
    assert worst_error(p.factors().gain[3:4], dense.gain()[3:4]) < 1e-5
    assert worst_error(F.merged_weight(*p.matrices, p.vectors, **p.options)[3:4], dense.merged_weight()[3:4]) < 1e-5


@directions
@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_nearly_cancelled_rows_keep_the_digits_that_are_there(ratio: float, direction: str) -> None:
    p = Problem(16, 6, 4, direction=direction)
    update = (p.B * p.vectors.lambda_d) @ p.A
    size = update.norm(dim=1, keepdim=True)
    p.weight = -update / size + ratio * torch.nn.functional.normalize(p.weight, dim=1)
    w = F.row_norm(p.weight)
    p.vectors = p.vectors._replace(lambda_b=(1.0 if direction == "unit" else w) / size[:, 0])
    assert p.dense().norm_ratio().max() < 3 * ratio
    # Rounding of the terms alone moves the square, a difference (w / n)**2 times smaller, by eps (w / n)**2.
    assert worst_error(p.gain(), p.dense().gain()) < 20 * 2.2e-16 / ratio**2


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_the_angle_keeps_its_digits_when_it_is_small(size: float) -> None:
    p = Problem(12, 9, 3)
    w, kappa = F.row_norm(p.weight), size * p.vectors.lambda_b
    angle = F.row_angle(kappa, *F.update_terms(p.weight, w, p.A, p.B, p.vectors.lambda_d))
    old = p.weight / w[:, None]
    new = torch.nn.functional.normalize(old + (kappa[:, None] * p.B * p.vectors.lambda_d) @ p.A, dim=1)
    expected = 2 * torch.atan2((new - old).norm(dim=1), (new + old).norm(dim=1))
    assert worst_error(angle, expected) < 1e-8
    zero = torch.zeros(9, dtype=torch.float64)
    assert not F.row_angle(kappa, zero, zero).any()
    assert torch.allclose(F.row_angle(zero - 3, zero + 1, zero + 1), zero + math.pi), "a reversed row"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine_returns_the_bits_of_the_base_for_a_gain_of_one(dtype: torch.dtype) -> None:
    y, bias = randn(50, 5, seed=0, dtype=dtype), randn(5, seed=1, dtype=dtype)
    zeros = torch.zeros(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for scale in (None, zeros):
        combined = F.combine(y, torch.zeros_like(y) if scale is not None else zeros.expand(50, 5), zeros, scale, bias)
        assert torch.equal(combined, y)


@pytest.mark.parametrize("name", ["weight", "A", "B", "bias", *NAMES])
def test_a_wrong_shape_is_refused_by_the_checked_copy(name: str) -> None:
    p = Problem(6, 5, 3)
    if name in NAMES:
        p.vectors = p.vectors._replace(**{name: randn(4, seed=0, dtype=torch.float64)})
    else:
        setattr(p, name, randn(*[4] * getattr(p, name).dim(), seed=0, dtype=torch.float64))
    with pytest.raises((TypeCheckError, RuntimeError)):
        p.outputs()


def test_a_shape_that_broadcasts_is_refused_by_the_checked_copy_alone() -> None:
    p = Problem(6, 5, 3)
    p.bias = randn(1, seed=0, dtype=torch.float64)
    with pytest.raises(TypeCheckError):
        p.outputs()
    unchecked.dvora_linear(p.x, p.weight, p.bias, p.A, p.B, p.vectors)  # without the cost of the check
