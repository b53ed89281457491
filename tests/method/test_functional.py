"""The method as pure functions, against the dense float64 method, with every shape annotation checked."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from dvora import functional as unchecked
from tests.cases import DIRECTIONS, LARGE_SIZES, SIZES, TOLERANCE, randn
from tests.method.problem import F, Problem
from tests.reference import worst_error

variants = pytest.mark.parametrize("scaling", [1.0, 0.25])
directions = pytest.mark.parametrize("direction", DIRECTIONS)
sizes = pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES + LARGE_SIZES[:2])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@directions
@variants
@sizes
def test_every_function_equals_the_dense_method(
    in_features: int, out_features: int, rank: int, scaling: float, direction: str, dtype: torch.dtype
) -> None:
    p = Problem(in_features, out_features, rank, dtype, scaling=scaling, direction=direction)
    dense = p.dense()
    merged = F.merged_weight(*p.matrices, p.vectors, **p.options)
    delta = F.delta_weight(*p.matrices, p.vectors, **p.options)
    y = F.dvora_linear(p.x, p.weight, p.bias, p.A, p.B, p.vectors, **p.options)
    assert worst_error(F.gain(*p.matrices, p.vectors, **p.options), dense.gain()) < TOLERANCE[dtype]
    assert worst_error(merged, dense.merged_weight()) < TOLERANCE[dtype]
    assert worst_error(delta, dense.merged_weight() - dense.weight) < TOLERANCE[dtype]
    assert worst_error(y, dense(p.x)) < TOLERANCE[dtype]


@directions
def test_given_terms_change_nothing(direction: str) -> None:
    p = Problem(6, 5, 3, direction=direction)
    for function in (F.gain, F.delta_weight, F.merged_weight):
        given_them = function(*p.matrices, p.vectors, p.norm(), **p.options)
        assert torch.equal(function(*p.matrices, p.vectors, **p.options), given_them)


def test_a_layer_without_bias_equals_the_dense_method() -> None:
    p = Problem(6, 5, 3)
    p.bias = None
    assert worst_error(F.dvora_linear(p.x, p.weight, None, p.A, p.B, p.vectors), p.dense()(p.x)) < 1e-12


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 9), st.integers(1, 12)),
    leading=st.lists(st.integers(0, 3), max_size=3),
    scaling=st.floats(0.01, 10),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
)
def test_any_shape_equals_the_dense_method(shape: tuple[int, int, int], leading: list[int], **options: object) -> None:
    p = Problem(*shape, **options)
    x = randn(*leading, shape[0], seed=8, dtype=torch.float64)
    y = F.dvora_linear(x, p.weight, p.bias, p.A, p.B, p.vectors, **p.options)
    assert worst_error(y, p.dense()(x)) < 1e-12


def test_the_row_norm_of_a_half_precision_weight_is_measured_in_float32() -> None:
    weight = torch.full((2, 4096), 0.01, dtype=torch.bfloat16)
    norm = F.row_norm(weight)
    assert norm.dtype == torch.float32
    assert worst_error(norm, weight.double().norm(dim=1)) < 1e-6


@sizes
def test_the_norm_from_vectors_equals_the_norm_of_the_dense_rows(
    in_features: int, out_features: int, rank: int
) -> None:
    p = Problem(in_features, out_features, rank)
    change = F.relative_norm(p.norm(), p.vectors.lambda_d, p.beta())
    ratio = p.dense().norm_ratio()
    assert worst_error(change.ratio, ratio) < 1e-12
    assert worst_error(change.change / change.u**2, ratio**2 - 1) < 1e-12


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_the_angle_keeps_its_digits_when_it_is_small(size: float) -> None:
    p = Problem(12, 9, 3, direction="weight")
    beta = size * p.vectors.lambda_b
    angle = F.row_angle(p.norm(), p.vectors.lambda_d, beta)
    old = torch.nn.functional.normalize(p.weight, dim=1)
    new = torch.nn.functional.normalize(p.weight + (beta[:, None] * p.B * p.vectors.lambda_d) @ p.A, dim=1)
    expected = 2 * torch.atan2((new - old).norm(dim=1), (new + old).norm(dim=1))
    assert worst_error(angle, expected) < 1e-8


def test_the_angle_of_a_reversed_row_is_a_half_turn() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    norm = F.norm_terms(weight, torch.eye(2), torch.tensor([[1.0, 0.0]] * 2))
    angle = F.row_angle(norm, torch.ones(2), torch.tensor([-3.0, 1.0]))
    assert angle.tolist() == pytest.approx([math.pi, 0.0])


@dtypes
@directions
def test_without_training_the_gain_is_exactly_one_and_the_delta_exactly_zero(
    direction: str, dtype: torch.dtype
) -> None:
    p = Problem(7, 5, 3, dtype, direction=direction)
    vectors = F.Vectors(F.row_norm(p.weight), torch.zeros(5, dtype=dtype), p.vectors.lambda_d)
    assert torch.equal(F.gain(*p.matrices, vectors, **p.options), torch.ones(5, dtype=dtype))
    assert not F.delta_weight(*p.matrices, vectors, **p.options).any()
    assert torch.equal(F.merged_weight(*p.matrices, vectors, **p.options), p.weight)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6])
def test_gain_minus_one_keeps_its_digits_in_float32(size: float) -> None:
    p = Problem(7, 5, 3, torch.float32)
    p.vectors = F.Vectors(F.row_norm(p.weight), size * p.vectors.lambda_b, p.vectors.lambda_d)
    ours = F.row_factors(p.vectors, p.norm(), p.beta()).gain_minus_one
    dense = p.dense()
    # The magnitude is the float32 row norm: the distance of that from the true one is not what is tested here.
    true_norm = p.weight.double().norm(dim=1)
    expected = dense.gain() * true_norm / dense.magnitude - 1
    assert worst_error(ours, expected) < 1e-5
    assert worst_error(1 + ours - 1, expected) > 1e-7 / size / 1e3, "the plain form would have done"


@directions
@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_nearly_cancelled_rows_keep_the_digits_that_are_there(ratio: float, direction: str) -> None:
    p = Problem(16, 6, 4, direction=direction)
    update = (p.B * p.vectors.lambda_d) @ p.A
    size = update.norm(dim=1, keepdim=True)
    p.weight = -update / size + ratio * torch.nn.functional.normalize(p.weight, dim=1)
    w = F.row_norm(p.weight)
    p.vectors = p.vectors._replace(lambda_b=(1.0 if direction == "unit" else w) / size[:, 0])
    ratios = p.dense().norm_ratio()
    assert ratios.max() < 3 * ratio
    s = F.relative_norm(p.norm(), p.vectors.lambda_d, p.beta()).ratio
    # Rounding of the terms alone moves a difference that is w / n times smaller by eps * w / n.
    assert worst_error(s, ratios) < 20 * 2.2e-16 / ratio


@directions
def test_zero_rows_have_gain_one(direction: str) -> None:
    p = Problem(6, 5, 3, direction=direction)
    p.weight[2] = 0
    gain = F.gain(*p.matrices, p.vectors, **p.options)
    assert gain[2] == 1
    assert worst_error(gain, p.dense().gain()) < 1e-12


def test_detach_norm_leaves_out_the_gradient_through_the_norm_only() -> None:
    p = Problem(6, 5, 3, detach_norm=True)
    names = ("magnitude", "lambda_b", "lambda_d")
    for vector in p.vectors:
        vector.requires_grad_()
    grad_output = randn(2, 3, 5, seed=9, dtype=torch.float64)
    y = F.dvora_linear(p.x, p.weight, p.bias, p.A, p.B, p.vectors, **p.options)
    ours = torch.autograd.grad(y, list(p.vectors), grad_output)
    dense = p.dense().gradients(p.x, grad_output)
    for name, gradient in zip(names, ours, strict=True):
        assert worst_error(gradient, dense[name]) < 1e-12, name


def test_combine_returns_the_bits_of_the_base_for_a_gain_of_one() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        y = randn(50, 5, seed=0, dtype=dtype)
        bias = randn(5, seed=1, dtype=dtype)
        assert torch.equal(F.combine(y, torch.zeros_like(y), torch.zeros(5), bias), y)


def test_combine_never_rescales_the_bias() -> None:
    bias = randn(5, seed=1)
    y = F.combine(bias.expand(3, 5), torch.zeros(3, 5), torch.full((5,), 0.7), bias)
    torch.testing.assert_close(y, bias.expand(3, 5))


@pytest.mark.parametrize("name", ["weight", "A", "B", "bias", "magnitude", "lambda_b", "lambda_d"])
def test_a_wrong_shape_is_refused_by_the_checked_copy(name: str) -> None:
    p = Problem(6, 5, 3)
    norm = p.norm()
    if name in F.Vectors._fields:
        p.vectors = p.vectors._replace(**{name: randn(4, seed=0, dtype=torch.float64)})
    else:
        setattr(p, name, randn(*[4] * getattr(p, name).dim(), seed=0, dtype=torch.float64))
    with pytest.raises((TypeCheckError, RuntimeError)):
        F.dvora_linear(p.x, p.weight, p.bias, p.A, p.B, p.vectors, norm, **p.options)


def test_a_shape_that_broadcasts_is_refused_by_the_checked_copy_alone() -> None:
    p = Problem(6, 5, 3)
    arguments = (p.x, p.weight, randn(1, seed=0, dtype=torch.float64), p.A, p.B, p.vectors)
    with pytest.raises(TypeCheckError):
        F.dvora_linear(*arguments)
    unchecked.dvora_linear(*arguments)  # as users import it, without the cost (or the graph breaks) of the check
