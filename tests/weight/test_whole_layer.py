"""Layers whose output is combined and whose gain is made in closed form, as a whole, for every kind of matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method.functional import Vectors
from dvora.weight.adapted_weight import MAGNITUDE_ONLY, AdaptedWeight
from dvora.weight.factors import factors_of
from dvora.weight.linear import Update, adapted_linear
from tests.cases import TOLERANCE, linear, randn, trained_layer
from tests.reference import DenseDVoRA, worst_error

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
VECTORS = Vectors._fields


def layer_of(
    in_features: int, out_features: int, rank: int, distribution: str, dtype: torch.dtype = torch.float64, **options
) -> DVoRAAdapter:
    shared = SharedProjections(3, distribution)
    return trained_layer(in_features, out_features, rank, dtype=dtype, shared=shared, **options)


def gradients(layer: DVoRAAdapter, y: Tensor, grad_output: Tensor, x: Tensor | None = None) -> dict[str, Tensor]:
    leaves = dict(zip(VECTORS, layer.vectors, strict=True)) | ({} if x is None else {"x": x})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_output), strict=True))


def assert_equal_to_the_dense_method(layer: DVoRAAdapter, x: Tensor, tolerance: float) -> None:
    dense, grad_output = DenseDVoRA.of(layer), randn(*x.shape[:-1], layer.adapted.out_features, seed=9, dtype=x.dtype)
    y = layer(x.requires_grad_())
    assert y.dtype == x.dtype
    assert worst_error(y, dense(x)) < tolerance
    expected = dense.gradients(x, grad_output)
    for name, gradient in gradients(layer, y, grad_output, x).items():
        assert worst_error(gradient, expected[name]) < tolerance, name


@every_distribution
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("detach_norm", [False, True], ids=["through the norm", "detach_norm"])
@pytest.mark.parametrize("tokens", [(2,), (40, 5)], ids=["few tokens", "many tokens"])
def test_outputs_and_gradients_equal_the_dense_method(
    tokens: tuple[int, ...], detach_norm: bool, bias: bool, dtype: torch.dtype, distribution: str
) -> None:
    layer = layer_of(40, 60, 24, distribution, dtype, bias=bias, detach_norm=detach_norm, alpha=9)
    assert_equal_to_the_dense_method(layer, randn(*tokens, 40, seed=8, dtype=dtype), 2 * TOLERANCE[dtype])


@given(
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(2, 12)),
    leading=st.lists(st.integers(1, 3), max_size=3),
    distribution=st.sampled_from(DISTRIBUTIONS),
    alpha=st.floats(0.1, 20),
    direction=st.sampled_from(["unit", "weight"]),
    detach_norm=st.booleans(),
)
def test_any_shape_equals_the_dense_method(
    shape: tuple[int, int, int], leading: list[int], distribution: str, **options: object
) -> None:
    layer = layer_of(*shape, distribution, **options)
    assert_equal_to_the_dense_method(layer, randn(*leading, shape[0], seed=8, dtype=torch.float64), 1e-11)


@every_distribution
@pytest.mark.parametrize("tokens", [(0,), (2, 0)], ids=str)
def test_no_tokens_give_zero_gradients(tokens: tuple[int, ...], distribution: str) -> None:
    layer = layer_of(6, 5, 3, distribution)
    x = torch.zeros(*tokens, 6, dtype=torch.float64).requires_grad_()
    y = layer(x)
    assert y.shape == (*tokens, 5)
    found = gradients(layer, y, torch.zeros_like(y), x)
    assert found.pop("x").shape == x.shape
    assert not any(gradient.any() for gradient in found.values())


@every_distribution
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_vectors_are_float32_in_half_precision(dtype: torch.dtype, distribution: str) -> None:
    layer = layer_of(40, 60, 8, distribution, dtype)
    dense, x = DenseDVoRA.of(layer), randn(50, 40, seed=8, dtype=dtype).requires_grad_()
    grad_output = randn(50, 60, seed=9, dtype=dtype)
    expected, found = dense.gradients(x, grad_output), gradients(layer, layer(x), grad_output, x)
    assert found.pop("x").dtype == dtype
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert worst_error(gradient, expected[name]) < 8 * torch.finfo(dtype).eps, name


@every_distribution
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_before_an_in_place_activation_trains_as_before_any_other(
    dtype: torch.dtype, distribution: str
) -> None:
    layer, x = layer_of(6, 5, 3, distribution, dtype), randn(7, 6, seed=8, dtype=dtype)
    grad_output, residual = randn(7, 5, seed=9, dtype=dtype), randn(7, 5, seed=10, dtype=dtype)
    expected = gradients(layer, nn.functional.relu(layer(x) + residual), grad_output)
    y = layer(x)
    y += residual
    for name, gradient in gradients(layer, nn.functional.relu(y, inplace=True), grad_output).items():
        assert torch.equal(gradient, expected[name]), name


@every_distribution
def test_a_layer_under_autocast_has_gradients(distribution: str) -> None:
    layer = layer_of(40, 60, 8, distribution, torch.float32)
    dense, x = DenseDVoRA.of(layer), randn(50, 40, seed=8).requires_grad_()
    grad_output = randn(50, 60, seed=9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected, found = dense.gradients(x, grad_output), gradients(layer, y, grad_output.to(y.dtype), x)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        assert worst_error(gradient, expected[name]) < 0.06, name


@every_distribution
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_under_vmap_equals_the_plain_layer(bias: bool, distribution: str) -> None:
    layer, x = layer_of(6, 5, 3, distribution, bias=bias), randn(4, 2, 6, seed=8, dtype=torch.float64)
    assert worst_error(vmap(layer)(x), layer(x).detach()) < 1e-12


@every_distribution
def test_the_second_of_two_backward_passes_through_one_graph_gives_the_same(distribution: str) -> None:
    layer, x = layer_of(6, 5, 3, distribution), randn(4, 6, seed=8, dtype=torch.float64).requires_grad_()
    y, grad_output = layer(x), randn(4, 5, seed=9, dtype=torch.float64)
    for _ in range(2):
        y.backward(grad_output, retain_graph=True)
    assert worst_error(x.grad / 2, DenseDVoRA.of(layer).gradients(x, grad_output)["x"]) < 1e-12


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_distribution
def test_a_weight_of_which_only_the_rows_are_rescaled(distribution: str, bias: bool) -> None:
    base = linear(6, 5, bias=bias, dtype=torch.float64)
    adapted = AdaptedWeight(base.weight.detach(), MAGNITUDE_ONLY, shared=SharedProjections(0, distribution))
    vectors = Vectors(*(vector.requires_grad_() for vector in adapted.initial_vectors(0.1)))
    with torch.no_grad():
        vectors.magnitude.mul_(1 + 0.2 * randn(5, seed=4))
    x, grad_output = randn(3, 6, seed=8, dtype=torch.float64), randn(3, 5, seed=9, dtype=torch.float64)
    base_output = base(x).detach()
    bias_of = torch.zeros(5, dtype=torch.float64) if base.bias is None else base.bias.detach()
    factors = factors_of(adapted, vectors, base.weight.detach())
    y = adapted_linear(Update(adapted, vectors, factors, None if base.bias is None else bias_of), base_output, x)
    products = base_output - bias_of
    assert worst_error(y, vectors.magnitude / adapted.w * products + bias_of) < 1e-12
    (gradient,) = torch.autograd.grad(y, vectors.magnitude, grad_output)
    assert worst_error(gradient, (grad_output * products).sum(0) / adapted.w) < 1e-12


@every_distribution
def test_a_base_output_is_not_written_to(distribution: str) -> None:
    layer, x = layer_of(6, 5, 3, distribution), randn(4, 6, seed=8, dtype=torch.float64)
    outputs = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: outputs.append((output, output.clone())))
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            layer(x)
    assert len(outputs) == 2
    assert all(torch.equal(*output) for output in outputs)
