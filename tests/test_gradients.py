"""The gradients in closed form against autograd on the dense float64 method, with every shape annotation checked."""

import pytest
import torch
from cases import DIRECTIONS, LARGE_SIZES, SIZES, TOLERANCE, randn
from checked import checked
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from problem import F, Problem, decompose
from reference import worst_error
from torch import Tensor

dvora_linear_backward = checked("gradients").dvora_linear_backward


def closed_form(p: Problem, x: Tensor, delta: Tensor, **options: bool):
    return dvora_linear_backward(delta, x, *p.matrices, p.vectors, p.constants(), **p.options, **options)


def assert_equal_to_the_dense_method(p: Problem, tolerance: float, tokens: int = 7) -> None:
    x = randn(tokens, p.weight.shape[1], seed=8, dtype=p.weight.dtype)
    delta = randn(tokens, p.weight.shape[0], seed=9, dtype=p.weight.dtype)
    ours = closed_form(p, x, delta, train_weight=True)
    expected = p.dense().gradients(x, delta)
    if p.weight.shape[1] == 1 and not p.options.get("detach_norm"):
        # A row of one value has no direction: these vanish, and their rounding errors have nothing to be relative to.
        for name in ("lambda_b", "lambda_d", "weight"):
            expected.pop(name)
    for name, gradient in expected.items():
        assert worst_error(getattr(ours, name), gradient) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize(("in_features", "out_features", "rank"), SIZES)
def test_all_gradients_equal_the_dense_method(
    in_features: int,
    out_features: int,
    rank: int,
    scaling: float,
    detach_norm: bool,
    direction: str,
    dtype: torch.dtype,
) -> None:
    options = {"scaling": scaling, "direction": direction, "detach_norm": detach_norm}
    assert_equal_to_the_dense_method(Problem(in_features, out_features, rank, dtype, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("in_features", "out_features", "rank"), LARGE_SIZES)
def test_all_gradients_of_large_layers_equal_the_dense_method(
    in_features: int, out_features: int, rank: int, dtype: torch.dtype
) -> None:
    assert_equal_to_the_dense_method(Problem(in_features, out_features, rank, dtype), TOLERANCE[dtype])


@given(
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 12)),
    tokens=st.integers(1, 4),
    scaling=st.floats(0.01, 10),
    direction=st.sampled_from(DIRECTIONS),
    detach_norm=st.booleans(),
)
def test_any_shape_equals_the_dense_method(shape: tuple[int, int, int], tokens: int, **options: object) -> None:
    assert_equal_to_the_dense_method(Problem(*shape, **options), 1e-12, tokens)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zero_rows_equal_the_dense_method(direction: str) -> None:
    p = Problem(6, 5, 3, direction=direction)
    p.weight[[0, 3]] = 0
    assert_equal_to_the_dense_method(p, 1e-12)


@pytest.mark.parametrize("ratio", [1e-2, 1e-4])
def test_nearly_cancelled_rows_equal_the_dense_method_to_conditioning(ratio: float) -> None:
    p = Problem(16, 6, 4)
    update = (p.B * p.vectors.lambda_d) @ p.A
    size = update.norm(dim=1, keepdim=True)
    p.weight = -update / size + ratio * torch.nn.functional.normalize(p.weight, dim=1)
    p.vectors = p.vectors._replace(lambda_b=1 / size[:, 0])
    assert_equal_to_the_dense_method(p, 40 * 2.2e-16 / ratio)


def test_no_tokens_give_zero_gradients() -> None:
    p = Problem(6, 5, 3)
    empty = torch.zeros(0, 6, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64)
    ours = closed_form(p, *empty)
    assert ours.x.shape == (0, 6)
    assert not any(gradient.any() for gradient in (ours.magnitude, ours.lambda_b, ours.lambda_d, ours.bias))


def test_the_gradient_of_a_frozen_weight_is_not_made() -> None:
    p = Problem(6, 5, 3)
    assert closed_form(p, p.x[0], p.x[0] @ p.weight.T).weight is None


def test_gradients_are_float32_for_half_precision_tensors() -> None:
    p = Problem(6, 5, 3, torch.float32)
    half = torch.bfloat16
    constants = F.norm_constants(p.weight, *decompose(p.A))
    delta, x = randn(4, 5, seed=0, dtype=half), randn(4, 6, seed=1, dtype=half)
    ours = dvora_linear_backward(delta, x, p.weight.to(half), p.A, p.B, p.vectors, constants, train_weight=True)
    assert {gradient.dtype for gradient in ours} == {torch.float32}


def test_gradients_carry_no_graph() -> None:
    p = Problem(6, 5, 3)
    for vector in p.vectors:
        vector.requires_grad_()
    assert not any(g.requires_grad for g in closed_form(p, p.x[0], p.x[0] @ p.weight.T, train_weight=True))


def test_a_wrong_shape_is_refused_by_the_checked_copy() -> None:
    p = Problem(6, 5, 3)
    with pytest.raises(TypeCheckError):
        closed_form(p, p.x[0], torch.zeros(3, 1, dtype=torch.float64))
