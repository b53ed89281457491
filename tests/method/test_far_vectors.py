"""Vectors far from where training starts: updates a million times their rows, gains near zero, tiny rows."""

import pytest
import torch
from torch import nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import DIRECTIONS, linear, randn
from tests.reference import DenseDVoRA, worst_error

IN, OUT, RANK = 24, 10, 4
TOLERANCE = 2e-5
far = pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e12, 1e20])
few_and_many = pytest.mark.parametrize("tokens", [3, 400], ids=["thin products", "updated weight"])


def far_layer(
    size: float, direction: str, distribution: str = "kaiming_uniform", base: nn.Linear | None = None, **options: object
) -> DVoRAAdapter:
    """A layer with updates of about `size` times its rows in every second row."""
    base = linear(IN, OUT) if base is None else base
    layer = DVoRAAdapter(base, RANK, shared=SharedProjections(3, distribution), direction=direction, **options)
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.2 * randn(OUT, seed=4))
        layer.lambda_b.copy_(randn(OUT, seed=5))
        layer.lambda_b[::2] *= size
        layer.lambda_d.add_(0.1 * randn(RANK, seed=6))
    return layer


def assert_as_the_dense_method(layer: DVoRAAdapter, tokens: int) -> None:
    """Outputs, merged weight and gradients, each row for itself: their sizes differ by far."""
    x, d = randn(tokens, IN, seed=7), randn(tokens, OUT, seed=8)
    dense = DenseDVoRA.of(layer)
    expected, gradients = dense(x), dense.gradients(x, d)
    with torch.no_grad():
        assert worst_error(layer.eval()(x), expected) < TOLERANCE
    x.requires_grad_()
    y = layer.train()(x)
    assert worst_error(y, expected) < TOLERANCE
    y.backward(d)
    assert worst_error(layer.merge_to_original_layer().weight, dense.merged_weight()) < TOLERANCE
    assert worst_error(x.grad, gradients["x"]) < TOLERANCE
    for name in ("magnitude", "lambda_d"):
        assert worst_error(layer.get_parameter(name).grad, gradients[name]) < 50 * TOLERANCE, name
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        ours, theirs = layer.lambda_b.grad[rows], gradients["lambda_b"][rows]
        # The gradient of a far larger update is a difference of numbers that agree in all their digits.
        if theirs.abs().max() > 1e-2:
            assert worst_error(ours, theirs) < 50 * TOLERANCE, rows
        assert ours.isfinite().all()


@far
@few_and_many
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
def test_large_updates_keep_their_digits(distribution: str, direction: str, tokens: int, size: float) -> None:
    assert_as_the_dense_method(far_layer(size, direction, distribution), tokens)


@few_and_many
@pytest.mark.parametrize("alpha", [1e10, 1e20])
def test_a_large_alpha_keeps_its_digits(alpha: float, tokens: int) -> None:
    assert_as_the_dense_method(far_layer(1.0, "unit", alpha=alpha), tokens)


@few_and_many
@pytest.mark.parametrize("norm", [1e-3, 1e-8, 1e-18])
def test_a_tiny_row_under_an_update_of_usual_size_keeps_its_digits(norm: float, tokens: int) -> None:
    base = linear(IN, OUT, bias=False)
    with torch.no_grad():
        base.weight[3] *= norm / base.weight[3].norm()
    assert_as_the_dense_method(far_layer(1.0, "weight", base=base), tokens)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("vector", ["magnitude", "lambda_b", "lambda_d"])
def test_finite_values_that_would_give_others_are_not_loaded(vector: str, assign: bool) -> None:
    layer, x = far_layer(1.0, "weight", alpha=1e3).eval(), randn(3, IN, seed=7)
    before, y = {name: value.clone() for name, value in layer.state_dict().items()}, layer(x)
    values = {name: value.clone() for name, value in before.items()}
    values[vector].fill_(3e38)
    values["base_layer.weight"] *= 1e-6
    with pytest.raises(
        ValueError, match=r"lambda_b and lambda_d in the state dict are so large that outputs would not"
    ):
        layer.load_state_dict(values, assign=assign)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), y)


def test_large_values_that_give_finite_ones_are_loaded() -> None:
    layer, x = far_layer(1e20, "unit").eval(), randn(3, IN, seed=7)
    other = far_layer(1.0, "unit").eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_small_updates_are_what_they_were(distribution: str) -> None:
    assert_as_the_dense_method(far_layer(1e-3, "unit", distribution), 3)
