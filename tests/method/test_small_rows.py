"""Rows of tiny norm beside a usual bias, in the plain layer."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from dvora import DVoRAAdapter, SharedProjections
from dvora.method.small_rows import SHARE, small_rows
from tests.cases import DIRECTIONS, linear, randn
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 24, 10, 4
TINY = [2, 5, 7]
NORMS = [1e-3, 1e-6, 1e-8, 1e-18, 1e-30]
tiny = pytest.mark.parametrize("norm", NORMS)
few_and_many = pytest.mark.parametrize("tokens", [3, 400])


def layer_with_tiny_rows(
    norm: float, *, dtype: torch.dtype = torch.float32, distribution: str = "kaiming_uniform", **options: object
) -> DVoRAAdapter:
    """Three rows of tiny norm, whose magnitudes training has made as large as the others'."""
    base = linear(IN, OUT, dtype=dtype)
    with torch.no_grad():
        base.weight[TINY] *= (norm / base.weight[TINY].double().norm(dim=1, keepdim=True)).to(dtype)
        base.bias[TINY] += base.bias[TINY].sign()
    layer = DVoRAAdapter(base, RANK, shared=SharedProjections(3, distribution), **options)
    with torch.no_grad():
        layer.magnitude.add_(0.3 * randn(OUT, seed=4).abs())
        layer.lambda_b.copy_(0.5 * randn(OUT, seed=5))
    return layer


@tiny
@few_and_many
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
def test_outputs_and_gradients_are_those_of_the_dense_method(
    distribution: str, direction: str, tokens: int, norm: float
) -> None:
    layer = layer_with_tiny_rows(norm, distribution=distribution, direction=direction)
    x, d = randn(tokens, IN, seed=7), randn(tokens, OUT, seed=8)
    dense = DenseDVoRA.of(layer)
    gradients = dense.gradients(x, d)
    with torch.no_grad():
        assert worst_error(layer.eval()(x), dense(x)) < 1e-5
    x.requires_grad_()
    y = layer.train()(x)
    assert worst_error(y, dense(x)) < 1e-5
    y.backward(d)
    assert worst_error(x.grad, gradients["x"]) < 1e-5
    for name in ("magnitude", "lambda_b", "lambda_d"):
        assert worst_error(layer.get_parameter(name).grad, gradients[name]) < 1e-4, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("norm", [1e-2, 1e-3, 1e-4])
def test_half_precision_has_the_digits_that_it_has_elsewhere(norm: float, dtype: torch.dtype, tolerance: float) -> None:
    layer = layer_with_tiny_rows(norm, dtype=dtype)
    x = randn(6, IN, seed=7, dtype=dtype)
    assert worst_error(layer(x), DenseDVoRA.of(layer)(x)) < tolerance


@tiny
@few_and_many
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_at_the_start_the_layer_is_its_base_to_the_last_bit(
    mode: type[AbstractContextManager[None]], tokens: int, norm: float
) -> None:
    base = layer_with_tiny_rows(norm).base_layer
    layer, x = DVoRAAdapter(base, RANK, shared=SharedProjections(3)), randn(tokens, IN, seed=7)
    with mode():
        assert torch.equal(layer(x), base(x))


def test_one_tiny_row_does_not_make_the_gradient_large() -> None:
    x, d = randn(64, IN, seed=7), randn(64, OUT, seed=8)

    def gradient(norm: float) -> Tensor:
        layer = layer_with_tiny_rows(norm)
        with torch.no_grad():
            layer.magnitude.copy_(layer.adapted.w)
        layer(x).backward(d)
        return layer.magnitude.grad

    assert worst_error(gradient(1e-8), gradient(0.5).double()) < 1e-4


@few_and_many
def test_a_trained_base_follows(tokens: int) -> None:
    layer = layer_with_tiny_rows(1e-6, freeze_base_layer=False)
    x, d = randn(tokens, IN, seed=7), randn(tokens, OUT, seed=8)
    gradients = DenseDVoRA.of(layer).gradients(x, d)
    layer(x).backward(d)
    assert worst_error(layer.base_layer.bias.grad, gradients["bias"]) < 1e-5
    rest = [row for row in range(OUT) if row not in TINY]
    for rows in (TINY, rest):
        assert worst_error(layer.base_layer.weight.grad[rows], gradients["weight"][rows]) < 1e-4, rows


def test_another_bias_and_another_weight_are_looked_at_anew() -> None:
    layer, x = layer_with_tiny_rows(1e-6).eval(), randn(5, IN, seed=7)
    layer(x)
    values = layer.state_dict()
    values["base_layer.weight"][TINY] = randn(3, IN, seed=9)
    values["base_layer.weight"][0] = 1e-7 * randn(IN, seed=9)
    layer.load_state_dict(values)
    assert worst_error(layer(x), DenseDVoRA.of(layer)(x)) < 1e-5
    with torch.no_grad():
        layer.base_layer.bias.zero_()
    assert worst_error(layer(x), DenseDVoRA.of(layer)(x)) < 1e-5
    assert layer.adapted.small_rows(layer.base_layer.bias) is None


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_layer_does_the_same(training: bool) -> None:
    layer, x = layer_with_tiny_rows(1e-8).train(training), randn(5, IN, seed=7)
    assert worst_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), DenseDVoRA.of(layer)(x)) < 1e-5


def test_a_layer_comes_back_from_the_meta_device() -> None:
    layer, x = layer_with_tiny_rows(1e-8).eval(), randn(5, IN, seed=7)
    expected, values = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(layer(x), expected)


def test_which_rows_are_small() -> None:
    w = torch.tensor([1.0, 0.0, 1e-3, 1e-3, 1.1 * SHARE, 0.9 * SHARE])
    bias = torch.tensor([50.0, 1.0, 0.0, -1.0, 1.0, 1.0])
    assert small_rows(w, bias).tolist() == [3, 5]
    assert small_rows(w, torch.zeros(6)) is None
    assert small_rows(w.double(), bias.bfloat16()).tolist() == [3, 5]
