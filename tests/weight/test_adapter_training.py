"""The explicit forms of training: backward, update_parameters, get and set, reset; against autograd and plain SGD."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from dvora import DVoRAAdapter
from tests.cases import DIRECTIONS, randn, trained_layer
from tests.interrupted import interrupted_at
from tests.reference import worst_error

IN, OUT, RANK = 6, 5, 3

frozen_or_not = pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])


def trained(layer: DVoRAAdapter) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


@frozen_or_not
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_explicit_training_equals_autograd_with_plain_sgd(
    bias: bool, detach_norm: bool, direction: str, freeze_base_layer: bool
) -> None:
    options = {"bias": bias, "detach_norm": detach_norm, "direction": direction}
    explicit = trained_layer(
        IN, OUT, RANK, dtype=torch.float64, alpha=2, freeze_base_layer=freeze_base_layer, **options
    )
    automatic = copy.deepcopy(explicit)
    sgd = torch.optim.SGD(automatic.parameters(), lr=0.002)
    for step in range(5):
        x = randn(2, 4, IN, seed=step, dtype=torch.float64)
        theirs = x.clone().requires_grad_()
        sgd.zero_grad()
        automatic(theirs).square().sum().backward()
        sgd.step()
        d_x = explicit.backward(2 * explicit(x).detach())
        explicit.update_parameters(0.002)
        assert worst_error(d_x, theirs.grad) < 1e-12
        for name, parameter in trained(explicit).items():
            assert worst_error(parameter, trained(automatic)[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@frozen_or_not
def test_explicit_gradients_of_half_precision_layers_agree_with_autograd(
    freeze_base_layer: bool, dtype: torch.dtype
) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, freeze_base_layer=freeze_base_layer)
    x, grad_output = randn(4, IN, seed=0, dtype=dtype).requires_grad_(), randn(4, OUT, seed=1, dtype=dtype)
    layer(x).backward(grad_output)
    automatic = {name: parameter.grad for name, parameter in trained(layer).items()}
    layer.reset_state()
    layer(x)
    d_x = layer.backward(grad_output)
    assert d_x.dtype == dtype
    assert worst_error(d_x, x.grad.double()) < 4 * torch.finfo(dtype).eps
    for name, parameter in trained(layer).items():
        assert parameter.grad.dtype == parameter.dtype
        assert worst_error(parameter.grad, automatic[name].double()) < 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3)], ids=str)
def test_backward_takes_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    x, grad_output = randn(*leading, IN, seed=0).requires_grad_(), randn(*leading, OUT, seed=1)
    (automatic,) = torch.autograd.grad(layer(x), x, grad_output)
    layer(x)
    torch.testing.assert_close(layer.backward(grad_output), automatic)


@frozen_or_not
def test_backward_adds_to_gradients_that_are_there(freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    x, grad_output = randn(4, IN, seed=0), randn(4, OUT, seed=1)
    layer(x)
    layer.backward(grad_output)
    once = {name: parameter.grad.clone() for name, parameter in trained(layer).items()}
    layer(x)
    layer.backward(grad_output)
    for name, parameter in trained(layer).items():
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_backward_before_forward_is_refused() -> None:
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        trained_layer(IN, OUT, RANK).backward(torch.zeros(4, OUT))


@pytest.mark.parametrize("forget", ["backward", "eval", "reset_state"])
def test_one_forward_serves_one_backward(forget: str) -> None:
    layer = trained_layer(IN, OUT, RANK)
    grad_output = layer(randn(4, IN, seed=0)).detach()
    if forget == "backward":
        layer.backward(grad_output)
    else:
        getattr(layer, forget)()
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        layer.backward(grad_output)


def test_a_forward_in_evaluation_keeps_no_input() -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    grad_output = layer(randn(4, IN, seed=0)).detach()
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(grad_output)


def test_copies_and_pickles_do_not_carry_the_last_input() -> None:
    layer = trained_layer(IN, OUT, RANK)
    grad_output = layer(randn(4, IN, seed=0)).detach()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            copied.backward(grad_output)
    layer.backward(grad_output)


@pytest.mark.parametrize("shape", [(4, OUT + 1), (3, OUT), (4, 1, OUT), (4 * OUT,)], ids=str)
def test_a_gradient_of_another_shape_is_refused_and_changes_nothing(shape: tuple[int, ...]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    layer(randn(4, IN, seed=0))
    with pytest.raises(ValueError, match=r"output_gradient has shape .* the last outputs had \(4, 5\)"):
        layer.backward(torch.zeros(shape))
    assert layer.magnitude.grad is None


def test_update_parameters_without_gradients_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call backward first"):
        trained_layer(IN, OUT, RANK).update_parameters(0.1)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_senseless_learning_rate_is_refused_and_changes_nothing(rate: float) -> None:
    layer = trained_layer(IN, OUT, RANK)
    layer(randn(4, IN, seed=0)).sum().backward()
    before = layer.get_parameters()
    with pytest.raises(ValueError, match=f"learning_rate must be finite and not negative, got {rate}"):
        layer.update_parameters(rate)
    assert torch.equal(layer.get_parameters(), before)


def test_update_parameters_clears_the_gradients() -> None:
    layer = trained_layer(IN, OUT, RANK)
    layer(randn(4, IN, seed=0)).sum().backward()
    layer.update_parameters(0.1)
    assert all(vector.grad is None for vector in layer.vectors)


def test_a_learning_rate_of_zero_changes_nothing() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    layer(randn(4, IN, seed=0)).sum().backward()
    layer.update_parameters(0)
    assert torch.equal(layer.get_parameters(), before)


@frozen_or_not
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_parameters_come_as_magnitude_lambda_b_lambda_d_then_the_base(bias: bool, freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, bias=bias, freeze_base_layer=freeze_base_layer)
    parts = [*layer.vectors, *([] if freeze_base_layer else layer.base_layer.parameters())]
    assert torch.equal(layer.get_parameters(), torch.cat([part.detach().flatten() for part in parts]))
    assert len(layer.get_parameters()) == layer.parameter_count


@frozen_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_set_parameters_undoes_any_change(dtype: torch.dtype, freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, dtype=dtype, freeze_base_layer=freeze_base_layer)
    x = randn(4, IN, seed=0, dtype=dtype)
    before, expected = layer.get_parameters(), layer(x)
    layer.set_parameters(before + 1)
    assert not torch.equal(layer(x), expected)
    layer.set_parameters(before)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.get_parameters(), before)


def test_get_parameters_is_a_copy() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    layer.get_parameters().zero_()
    assert torch.equal(layer.get_parameters(), before)


@pytest.mark.parametrize("shape", [(12,), (14,), (13, 1), ()], ids=str)
def test_parameters_of_another_size_are_refused_and_change_nothing(shape: tuple[int, ...]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    with pytest.raises(ValueError, match=r"must have shape \(13,\) for this layer"):
        layer.set_parameters(torch.zeros(shape))
    assert torch.equal(layer.get_parameters(), before)


@pytest.mark.parametrize("value", [[1.0] * 13, np.ones(13), torch.ones(13, dtype=torch.complex64)])
def test_parameters_and_gradients_that_are_no_real_tensors_are_refused(value: object) -> None:
    layer = trained_layer(IN, OUT, RANK)
    with pytest.raises(TypeError, match="parameters must be a tensor of real numbers"):
        layer.set_parameters(value)
    layer(randn(IN, seed=0))
    with pytest.raises(TypeError, match="output_gradient must be a tensor of real numbers"):
        layer.backward(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_refused_and_change_nothing(value: float) -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    broken = before.clone()
    broken[-1] = value
    with pytest.raises(ValueError, match="parameters must be finite"):
        layer.set_parameters(broken)
    assert torch.equal(layer.get_parameters(), before)


def test_parameters_that_are_finite_in_a_wider_dtype_only_are_refused_and_change_nothing() -> None:
    layer = trained_layer(IN, OUT, RANK)
    before = layer.get_parameters()
    broken = before.double()
    broken[-1] = 1e39
    with pytest.raises(ValueError, match=r"parameters must be finite in torch\.float32"):
        layer.set_parameters(broken)
    assert torch.equal(layer.get_parameters(), before)


@frozen_or_not
@pytest.mark.parametrize("call", ["set_parameters", "update_parameters"])
def test_an_interruption_finds_all_old_values_or_all_new_ones(call: str, freeze_base_layer: bool) -> None:
    def run(moment: int) -> tuple[Tensor, bool]:
        layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
        layer(randn(4, IN, seed=0)).sum().backward()
        argument = 0.1 if call == "update_parameters" else layer.get_parameters() + 1
        interrupted = interrupted_at(moment, partial(getattr(layer, call), argument))
        return layer.get_parameters(), interrupted

    old = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer).get_parameters()
    new, _ = run(10**6)
    assert not torch.isclose(old, new, rtol=1e-7, atol=0).any()
    moments = 0
    while (after := run(moments))[1]:
        assert torch.equal(after[0], old) or torch.equal(after[0], new), f"half written at line {moments}"
        moments += 1
    assert moments > 8


@frozen_or_not
def test_reset_state_forgets_gradients_and_keeps_values(freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    before = layer.get_parameters()
    layer(randn(4, IN, seed=0)).sum().backward()
    layer.reset_state()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert torch.equal(layer.get_parameters(), before)
