"""PyTorch's transformations of the layer give what the plain layer gives."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dvora import DVoRAAdapter, SharedProjections
from tests.cases import DIRECTIONS, SHARED, fresh_copy, linear, randn, train, trained_layer
from tests.reference import worst_error

IN, OUT, RANK = 6, 5, 3


def gradients(layer: nn.Module, y: Tensor) -> dict[str, Tensor]:
    trained = {name.removeprefix("_orig_mod."): p for name, p in layer.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(y.square().sum(), list(trained.values())), strict=True))


@pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
def test_functional_call_uses_the_values_it_is_given(freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    x, before = randn(4, IN, seed=0), layer(randn(4, IN, seed=0))
    values = {name: 1.5 * value.detach() for name, value in layer.named_parameters()}
    other = fresh_copy(layer)
    other.load_state_dict(values)
    torch.testing.assert_close(functional_call(layer, values, x), other(x))
    assert torch.equal(layer(x), before), "the layer itself has changed"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_vmap_over_stacked_vectors_equals_one_layer_after_the_other(direction: str) -> None:
    layer = trained_layer(IN, OUT, RANK, direction=direction)
    vectors = {name: value.detach() for name, value in layer.vectors._asdict().items()}
    stacked = {name: torch.stack([value, 0.5 * value, -value]) for name, value in vectors.items()}
    x = randn(4, IN, seed=0)
    together = vmap(lambda values: functional_call(layer, values, x))(stacked)
    for index, y in enumerate(together):
        single = {name: value[index] for name, value in stacked.items()}
        torch.testing.assert_close(y, functional_call(layer, single, x))


def test_vmap_over_inputs_equals_a_batch() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x = randn(4, IN, seed=0)
    torch.testing.assert_close(vmap(layer)(x), layer(x))


@pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
def test_func_grad_equals_autograd(freeze_base_layer: bool) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    x = randn(4, IN, seed=0)
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    by_func = grad(lambda values: functional_call(layer, values, x).square().sum())(trained)
    expected = gradients(layer, layer(x))
    assert by_func.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(by_func[name], gradient)


def test_gradients_of_each_sample_add_up_to_those_of_the_batch() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x = randn(4, IN, seed=0)
    vectors = {name: value.detach() for name, value in layer.vectors._asdict().items()}
    each = vmap(grad(lambda values, row: functional_call(layer, values, row).square().sum()), (None, 0))(vectors, x)
    expected = gradients(layer, layer(x))
    for name, gradient in each.items():
        torch.testing.assert_close(gradient.sum(0), expected[name])


def test_the_jacobian_of_the_outputs_is_the_merged_weight() -> None:
    layer = trained_layer(IN, OUT, RANK)
    torch.testing.assert_close(jacrev(layer)(randn(IN, seed=0)), layer.merge_to_original_layer().weight.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
def test_autocast_does_not_round_the_gain(freeze_base_layer: bool, dtype: torch.dtype) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    weight = layer.base_layer.weight
    factors = layer.adapted.factors(layer.vectors, weight)
    merged = layer.merge_to_original_layer().weight
    with torch.autocast("cpu", dtype):
        y = layer(randn(4, IN, seed=0))
        under_autocast = layer.adapted.factors(layer.vectors, weight)
        merged_autocast = layer.merge_to_original_layer().weight
    assert y.dtype == dtype
    assert all(map(torch.equal, under_autocast, factors))
    assert under_autocast.gain_minus_one.dtype == torch.float32
    torch.testing.assert_close(merged_autocast, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize("tokens", [1, 40, 400])
def test_a_backward_pass_within_autocast_gives_the_bits_of_one_outside(tokens: int, distribution: str) -> None:
    layer = trained_layer(IN, OUT, RANK, shared=SharedProjections(3, distribution))
    gradients = []
    for within in (True, False):
        x = randn(tokens, IN, seed=0).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().sum()
            if within:
                loss.backward()
        if not within:
            loss.backward()
        gradients.append([x.grad, *(vector.grad for vector in layer.vectors)])
        layer.zero_grad()
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("distribution", ["kaiming_uniform", "structured"])
@pytest.mark.parametrize("shape", [(IN,), (40, IN)], ids=str)
def test_gradients_may_be_asked_for_in_batches(shape: tuple[int, ...], distribution: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK, shared=SharedProjections(3, distribution)), randn(*shape, seed=0)
    at_once, one_by_one = (torch.autograd.functional.jacobian(layer, x, vectorize=batched) for batched in (True, False))
    torch.testing.assert_close(at_once, one_by_one)


def test_constants_made_under_autocast_are_not_rounded() -> None:
    base = linear(IN, OUT)
    plain = train(DVoRAAdapter(base, RANK, shared=SHARED))
    with torch.autocast("cpu", torch.bfloat16):
        made = train(DVoRAAdapter(base, RANK, shared=SharedProjections(SHARED.seed)))
    x = randn(4, IN, seed=0)
    assert torch.equal(made(x), plain(x))


def test_a_training_step_under_autocast_gives_gradients_near_the_plain_ones() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x = randn(4, IN, seed=0)
    expected = gradients(layer, layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    for name, gradient in gradients(layer, y.float()).items():
        assert gradient.dtype == torch.float32
        assert worst_error(gradient, expected[name].double()) < 0.02, name


CHECKED = [
    pytest.param(options, id=", ".join(options) or "defaults")
    for options in ({}, {"direction": "weight"}, {"freeze_base_layer": False}, {"alpha": 2, "bias": False})
]


@pytest.mark.parametrize("options", CHECKED)
def test_first_and_second_derivatives_equal_finite_differences(options: dict[str, object]) -> None:
    layer = trained_layer(3, 4, 2, dtype=torch.float64, **options)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(trained, values, strict=True)), x)

    arguments = (randn(2, 3, seed=0, dtype=torch.float64), *(p.detach() for p in trained.values()))
    arguments = tuple(argument.clone().requires_grad_() for argument in arguments)
    assert torch.autograd.gradcheck(outputs, arguments)
    assert torch.autograd.gradgradcheck(outputs, arguments)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_made_without_gradients_can_be_trained(mode) -> None:
    base, shared, x = linear(IN, OUT), SharedProjections(SHARED.seed), randn(4, IN, seed=0)
    with mode():
        layer = DVoRAAdapter(base, RANK, shared=shared)
        layer(x)
    layer(x).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    expected = DVoRAAdapter(linear(IN, OUT), RANK, shared=SHARED)
    expected.backward(2 * expected(x).detach())
    expected.update_parameters(0.01)
    torch.testing.assert_close(layer.get_parameters(), expected.get_parameters())


def test_outputs_in_inference_mode_equal_those_outside() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x = randn(4, IN, seed=0)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(y, layer(x))


def traced(layer: DVoRAAdapter, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # It is deprecated, and says what it does not record.
        warnings.simplefilter("ignore")
        return torch.jit.trace(layer, (x,))(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("trace", [lambda layer, x: make_fx(layer)(x)(x), traced], ids=["make_fx", "jit.trace"])
def test_a_traced_layer_equals_the_layer(trace: Callable[[DVoRAAdapter, Tensor], Tensor], training: bool) -> None:
    layer, x = trained_layer(IN, OUT, RANK).train(training), randn(4, IN, seed=0)
    torch.testing.assert_close(trace(layer, x), layer(x))


def test_a_layer_runs_on_tensors_without_values() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(4, IN)).shape == (4, OUT)
    layer(randn(4, IN, seed=0))


# PyTorch compiles its rules for forward mode when they are first used, by a function that it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_differentiation_equals_the_product_with_the_merged_weight() -> None:
    layer = trained_layer(IN, OUT, RANK)
    x, tangent = randn(4, IN, seed=0), randn(4, IN, seed=1)
    expected = tangent @ layer.merge_to_original_layer().weight.T
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], expected)
