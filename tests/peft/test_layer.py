"""Wrapped layers in whole models: the start, dtypes, and the dense float64 method."""

import warnings
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from dvora.peft import DVoRALayer
from tests.peft.dense_weights import DenseModel, gradients_by_parameter
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, inputs, outputs, same_bits, train_vectors


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options})
    return get_peft_model(MODELS[name]().to(dtype), config)


def trained(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    model = adapted(name, dtype, **options)
    train_vectors(model)
    return model


# One layer.


def linear(in_features: int, out_features: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(in_features, out_features)


def conv1d(in_features: int, out_features: int) -> Conv1D:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Conv1D(out_features, in_features)


def wrapped(base: nn.Module, **options: object) -> DVoRALayer:
    model = get_peft_model(nn.Sequential(base), DVoRAConfig(**{"r": 5, "target_modules": ["0"], **options}))
    train_vectors(model)
    return next(layer for _, layer in dvora_layers(model.eval()))


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"detach_norm": True}], ids=str)
def test_a_linear_layer_gives_the_bits_of_the_plain_adapter(direction: str, options: dict[str, object]) -> None:
    layer = wrapped(linear(10, 7), direction=direction, **options)
    plain = DVoRAAdapter(linear(10, 7), 5, shared=SharedProjections(0), direction=direction, **options)
    with torch.no_grad():
        for own, other in zip(plain.vectors, layer.vectors("default"), strict=True):
            own.copy_(other)
    assert same_bits(layer(x(3, 10)), plain(x(3, 10)))


# transformers' Conv1D itself needs two dimensions.
@pytest.mark.parametrize(("make", "shapes"), [(linear, [(10,), (2, 3, 4, 10), (2, 0, 10)]), (conv1d, [(2, 3, 4, 10)])])
def test_inputs_may_have_any_number_of_leading_dimensions(
    make: Callable[[int, int], nn.Module], shapes: list[tuple[int, ...]]
) -> None:
    layer = wrapped(make(10, 7))
    for shape in shapes:
        flat = layer(x(*shape).reshape(-1, 10)).reshape(*shape[:-1], 7)
        torch.testing.assert_close(layer(x(*shape)), flat, rtol=0, atol=1e-6)


def test_the_base_is_called_once_and_as_it_is() -> None:
    layer = wrapped(linear(10, 7))
    calls: list[torch.Tensor] = []
    layer.base_layer.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    inputs = x(3, 10)
    layer(inputs)
    assert [call is inputs for call in calls] == [True]


def test_models_that_read_the_weight_of_a_layer_find_it() -> None:
    wo = adapted("t5").get_submodule("base_model.model.encoder.block.0.layer.1.DenseReluDense.wo")
    assert wo.weight is wo.base_layer.weight


@pytest.mark.parametrize("name", [name for name in CASES if "tied" not in name and "weight_norm" not in name])
def test_the_delta_of_a_layer_is_what_merging_adds_to_its_weight(name: str) -> None:
    model = get_peft_model(CASES[name].base(), CASES[name].config(strength=0.7))
    train_vectors(model)
    layers = [layer for _, layer in dvora_layers(model)]
    expected = [layer.unmerged() + layer.get_delta_weight("default") for layer in layers]
    model.merge_adapter()
    for layer, weight in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.stored().detach(), weight.detach())


# The start, and dtypes.


def projections(model: nn.Module) -> list[SharedProjections]:
    return list({id(m): m for m in model.modules() if isinstance(m, SharedProjections)}.values())


def test_without_init_weights_a_new_adapter_is_not_the_identity_and_always_the_same() -> None:
    model, again = (adapted("bert", init_weights=False) for _ in range(2))
    assert worst_difference(outputs(model), outputs(MODELS["bert"]())) > 0.01
    assert same_bits(outputs(model), outputs(again))
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=LAYERS["bert"], init_weights=False))
    vectors = [layer.vectors(name) for _, layer in dvora_layers(model) for name in ("default", "second")]
    assert len({tuple(lambda_b.tolist()) for _, lambda_b, _ in vectors}) == len(vectors)  # another one for each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casting_the_model_to_half_precision_leaves_vectors_and_matrices_alone(dtype: torch.dtype) -> None:
    model = trained("gpt2")

    def values() -> list[torch.Tensor]:
        vectors = [v for _, layer in dvora_layers(model) for v in layer.vectors("default")]
        return [v.clone() for v in (*vectors, projections(model)[0].A(6, 32), projections(model)[0].B(6, 32))]

    before = values()
    model.to(dtype)
    assert {layer.base_layer.weight.dtype for _, layer in dvora_layers(model)} == {dtype}
    assert all(same_bits(now, was) for now, was in zip(values(), before, strict=True))


def test_autocast_keeps_a_new_adapter_the_identity() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(outputs(adapted("bert")), outputs(MODELS["bert"]()))


def test_one_projections_object_serves_all_layers_and_adapters_of_a_seed_and_distribution() -> None:
    model = adapted("bert")
    for name, settings in {
        "wider": {"r": 70, "target_modules": "all-linear"},
        "seed": {"r": 4, "projection_seed": 5},
        "same seed": {"r": 8, "projection_seed": 5},
        "distribution": {"r": 4, "projection_init": "peft_vera(r=4, in=32, out=32)"},
    }.items():
        model.add_adapter(name, DVoRAConfig(**{"target_modules": ["key"], **settings}))
    found = sorted((each.seed, each.distribution) for each in projections(model))
    assert found == [(0, "kaiming_uniform"), (0, "peft_vera(r=4, in=32, out=32)"), (5, "kaiming_uniform")]


def cast_what_is_trained(model: nn.Module) -> None:
    """By `parameter.data`, of which a module learns nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def test_a_rounded_magnitude_is_reported_once() -> None:
    model = adapted("llama")
    cast_what_is_trained(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        outputs(model)
        outputs(model)
    assert [str(warning.message).partition(",")[0] for warning in caught] == ["a DVoRA magnitude is in torch.bfloat16"]


def test_vectors_that_are_frozen_while_a_trainer_is_made_stay_whole() -> None:
    model = adapted("llama", inference_mode=True)
    before = outputs(model)
    cast_what_is_trained(model)
    model.set_adapter("default")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert len(trained) == 3 * 2 * len(LAYERS["llama"])
    assert same_bits(outputs(model), before)


# The dense method, and DoRA.


VARIANTS = [
    pytest.param({}, id="defaults"),
    pytest.param({"direction": "weight"}, id="weight"),
    pytest.param({"alpha": 2.5, "detach_norm": True}, id="alpha, detach_norm"),
    pytest.param({"direction": "weight", "detach_norm": True, "alpha": 9}, id="weight, alpha, detach_norm"),
    pytest.param({"r": 50, "projection_init": "kaiming_uniform", "projection_seed": 4}, id="dense, rank above sizes"),
    pytest.param({"r": 50, "projection_seed": 2**64 - 1}, id="rank above sizes, largest seed"),
]


# Llama and T5 normalise in float32 even in a float64 model, which hides the last digits.
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("options", VARIANTS)
def test_outputs_and_gradients_equal_the_dense_model(name: str, options: dict[str, object]) -> None:
    model = trained(name, torch.float64, **options)
    dense = DenseModel(MODELS[name](), model)
    expected = dense(**inputs(model))
    (expected * torch.linspace(-1, 2, expected.numel()).double().view_as(expected)).sum().backward()
    for _ in range(2):  # the second makes the factors of all layers together
        assert worst_difference(outputs(model), expected) < 1e-12
        gradients(model)
        for parameter, gradient in gradients_by_parameter(model).items():
            assert worst_difference(gradient, dense.gradients()[parameter]) < 1e-12, parameter


def test_alpha_and_ranks_by_layer_follow_the_patterns() -> None:
    model = adapted("mlp", alpha=3, rank_pattern={"lin1": 9, "^lin2": 2}, alpha_pattern={"lin1": 18, "lin2": 5})
    layers = {name: layer.adapted("default") for name, layer in dvora_layers(model)}
    assert {name: each.rank for name, each in layers.items()} == {"lin0": 6, "lin1": 9, "lin2": 2}
    assert {name: each.scaling for name, each in layers.items()} == {"lin0": 0.5, "lin1": 2.0, "lin2": 2.5}


@pytest.mark.parametrize("groups", [1, 3])
def test_dropout_drops_inputs_of_the_update_and_not_of_the_gain(groups: int) -> None:
    layer = trained("mlp", dvora_dropout=0.5, lambda_d_groups=groups).train().get_submodule("base_model.model.lin0")
    assert not torch.equal(layer(x(8, 10)), layer(x(8, 10)))
    with torch.no_grad():
        layer.dvora_lambda_b["default"].zero_()
    assert torch.equal(layer(x(8, 10)), layer(x(8, 10)))
    assert not torch.equal(layer(x(8, 10)), layer.base_layer(x(8, 10)))


def test_a_trained_bias_is_not_rescaled_and_gets_its_gradient() -> None:
    layer = trained("mlp", bias="dvora_only").get_submodule("base_model.model.lin0")
    y = layer(x(8, 10))
    y.sum().backward()
    assert torch.allclose(layer.base_layer.bias.grad, torch.full((24,), 8.0), rtol=1e-5)
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
        assert torch.allclose(layer(x(8, 10)) - y, torch.ones_like(y), atol=1e-5)
