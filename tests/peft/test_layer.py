"""One wrapped layer, and whole models of them: the start, dtypes, and the dense float64 method."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dvora import DVoRAAdapter, DVoRAConfig, SharedProjections
from dvora.peft import DVoRALayer
from tests.peft.dense import dense_gradients_by_peft_name, dense_model
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, loss, outputs, same_bits, train_vectors

# One layer.


def conv1d(in_features: int, out_features: int) -> Conv1D:
    """A layer of GPT-2 with the values that `linear` has."""
    layer, like = Conv1D(out_features, in_features), linear(in_features, out_features)
    with torch.no_grad():
        layer.weight.copy_(like.weight.T)
        layer.bias.copy_(like.bias)
    return layer


def linear(in_features: int, out_features: int) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(in_features, out_features)


def wrapped(base: nn.Module, **options: object) -> DVoRALayer:
    """The only layer of a model, adapted and trained."""
    model = get_peft_model(nn.Sequential(base), DVoRAConfig(**{"r": 5, "target_modules": ["0"], **options}))
    train_vectors(model)
    return next(layer for _, layer in dvora_layers(model.eval()))


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}, {"detach_norm": True}], ids=str)
def test_a_linear_layer_gives_the_bits_of_the_plain_adapter(direction: str, options: dict[str, object]) -> None:
    layer = wrapped(linear(10, 7), direction=direction, **options)
    plain = DVoRAAdapter(linear(10, 7), 5, shared=SharedProjections(0, "structured"), direction=direction, **options)
    with torch.no_grad():
        for own, other in zip(plain.vectors, layer.vectors("default"), strict=True):
            own.copy_(other)
    assert same_bits(layer(x(3, 10)), plain(x(3, 10)))


@pytest.mark.parametrize("make", [linear, conv1d])
@pytest.mark.parametrize("shape", [(10,), (1, 10), (2, 3, 4, 10), (0, 10), (2, 0, 10)], ids=str)
def test_inputs_may_have_any_number_of_leading_dimensions(
    make: Callable[[int, int], nn.Module], shape: tuple[int, ...]
) -> None:
    if make is conv1d and shape == (10,):
        shape = (1, 10)  # transformers' Conv1D itself needs two dimensions
    layer = wrapped(make(10, 7))
    inputs = x(*shape)
    assert layer(inputs).shape == (*shape[:-1], 7)
    flat = layer(inputs.reshape(-1, 10)).reshape(*shape[:-1], 7)
    assert torch.allclose(layer(inputs), flat, atol=1e-6)


def test_the_base_is_called_once_and_as_it_is() -> None:
    layer = wrapped(linear(10, 7))
    calls: list[torch.Tensor] = []
    layer.base_layer.register_forward_hook(lambda _, args, __: calls.append(args[0]))
    inputs = x(3, 10)
    layer(inputs)
    assert len(calls) == 1
    assert calls[0] is inputs


def test_a_zero_row_stays_zero_and_finite() -> None:
    base = linear(10, 7)
    with torch.no_grad():
        base.weight[2] = 0
    layer = wrapped(base)
    y = layer(x(3, 10))
    y.sum().backward()
    assert torch.allclose(y[:, 2], base.bias[2].expand(3))
    assert all(vector.grad.isfinite().all() for vector in layer.vectors("default"))


def test_the_layer_shows_its_sizes_and_its_adapters() -> None:
    shown = repr(wrapped(linear(10, 7)))
    assert shown.startswith("dvora.DVoRALinear(")
    for part in ("in_features=10, out_features=7", "rank=5", "alpha=5", "direction='unit'", "seed=0"):
        assert part in shown


def test_models_that_read_the_weight_of_a_layer_find_it() -> None:
    model = get_peft_model(MODELS["t5"](), DVoRAConfig(r=3, target_modules=["wo"]))
    wo = model.get_submodule("base_model.model.encoder.block.0.layer.1.DenseReluDense.wo")
    assert wo.weight.dtype == torch.float32


# The start, and dtypes.


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


HALVES = [torch.bfloat16, torch.float16]


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options})
    return get_peft_model(MODELS[name]().to(dtype), config)


def vector_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {vector.dtype for _, layer in dvora_layers(model) for vector in layer.vectors("default")}


def projections(model: nn.Module) -> list[SharedProjections]:
    """The distinct objects."""
    return list({id(m): m for m in model.modules() if isinstance(m, SharedProjections)}.values())


@pytest.mark.parametrize(
    ("dtype", "direction"), [*((dtype, "unit") for dtype in DTYPES), (torch.float32, "weight")], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_returns_the_bits_of_the_base(name: str, dtype: torch.dtype, direction: str) -> None:
    base = outputs(MODELS[name]().to(dtype))
    assert same_bits(outputs(adapted(name, dtype, direction=direction)), base)


def test_without_init_weights_a_new_adapter_is_not_the_identity_and_always_the_same() -> None:
    base = outputs(MODELS["bert"]())
    model, again = (adapted("bert", init_weights=False) for _ in range(2))
    assert worst_difference(outputs(model), base) > 0.01
    assert same_bits(outputs(model), outputs(again))
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=LAYERS["bert"], init_weights=False))
    vectors = [layer.vectors(name) for _, layer in dvora_layers(model) for name in ("default", "second")]
    assert len({tuple(lambda_b.tolist()) for _, lambda_b, _ in vectors}) == len(vectors)  # another one for each


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casting_the_model_to_half_precision_leaves_vectors_and_matrices_alone(dtype: torch.dtype) -> None:
    model = adapted("gpt2")
    train_vectors(model)
    vectors = [[v.clone() for v in layer.vectors("default")] for _, layer in dvora_layers(model)]
    matrices = {k: v.clone() for k, v in projections(model)[0].saved_tensors().items()}
    model.to(dtype)
    for (_, layer), before in zip(dvora_layers(model), vectors, strict=True):
        assert layer.base_layer.weight.dtype == dtype
        assert all(same_bits(now, was) for now, was in zip(layer.vectors("default"), before, strict=True))
    assert all(same_bits(v, matrices[k]) for k, v in projections(model)[0].saved_tensors().items())
    assert all(v.requires_grad for _, layer in dvora_layers(model) for v in layer.vectors("default"))


def test_large_activations_that_the_float16_base_can_bear_do_not_overflow_in_the_adapter() -> None:
    x = 3000 * torch.ones(2, 1024, dtype=torch.float16)
    x[:, ::2] *= -1
    base = nn.Sequential(nn.Linear(1024, 64, dtype=torch.float16))
    expected = base(x).detach()
    assert expected.isfinite().all()
    model = get_peft_model(base, DVoRAConfig(r=64, target_modules=["0"]))
    with torch.no_grad():
        assert same_bits(model(x), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_keeps_a_new_adapter_the_identity(dtype: torch.dtype) -> None:
    base, model = MODELS["bert"](), adapted("bert")
    with torch.autocast("cpu", dtype):
        assert same_bits(outputs(model), outputs(base))


def test_one_projections_object_serves_all_layers_and_adapters_of_a_seed() -> None:
    dense: dict[str, Any] = {"projection_init": "kaiming_uniform"}
    model = adapted("bert", **dense)
    model.add_adapter("wider", DVoRAConfig(r=70, target_modules="all-linear", **dense))
    model.add_adapter("other layers", DVoRAConfig(r=3, target_modules=["key"], **dense))
    (shared,) = projections(model)
    assert set(shared.saved_tensors()) == {"stream_0", "stream_1"}
    layers = [layer for _, layer in dvora_layers(model)]
    for name in model.peft_config:
        assert all(layer.adapted(name).shared is shared for layer in layers if name in layer.dvora_adapted)


def test_adapters_of_other_seeds_and_distributions_have_projections_of_their_own() -> None:
    model = adapted("mlp")
    model.add_adapter("seed", DVoRAConfig(r=4, target_modules=["lin0"], projection_seed=5))
    model.add_adapter("distribution", DVoRAConfig(r=4, target_modules=["lin0"], projection_init="kaiming_uniform"))
    model.add_adapter("same", DVoRAConfig(r=8, target_modules=["lin0"], projection_seed=5))
    found = {(each.seed, each.distribution) for each in projections(model)}
    assert found == {(0, "structured"), (5, "structured"), (0, "kaiming_uniform")}
    assert len(projections(model)) == 3


def of_llama(**settings: object) -> nn.Module:
    return get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"], **settings))


def cast_what_is_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """By `parameter.data`, of which a module learns nothing."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_magnitude_is_reported_once(dtype: torch.dtype) -> None:
    model = of_llama()
    cast_what_is_trained(model, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        outputs(model)
        outputs(model)
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        f"a DVoRA magnitude is in {dtype}, which rounds it by up to 0.4 % and loses small steps"
    ]


def test_vectors_that_are_frozen_while_a_trainer_is_made_stay_whole() -> None:
    model = of_llama(inference_mode=True)
    before = outputs(model)
    cast_what_is_trained(model, torch.bfloat16)
    model.set_adapter("default")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert len(trained) == 3 * 2 * len(LAYERS["llama"])
    assert same_bits(outputs(model), before)


# The dense method, and DoRA.


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


VARIANTS = [
    pytest.param({}, id="defaults"),
    pytest.param({"direction": "weight"}, id="weight"),
    pytest.param({"alpha": 2.5, "detach_norm": True}, id="alpha, detach_norm"),
    pytest.param({"direction": "weight", "detach_norm": True, "alpha": 9}, id="weight, alpha, detach_norm"),
    pytest.param({"r": 50, "projection_init": "structured", "projection_seed": 4}, id="structured, rank above sizes"),
    pytest.param({"r": 50, "projection_seed": 2**64 - 1}, id="rank above sizes, largest seed"),
]


def trained(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A tiny model with an adapter that does a lot."""
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options})
    model = get_peft_model(MODELS[name]().to(dtype), config)
    train_vectors(model)
    return model


# Llama and T5 normalise in float32 even in a float64 model, which hides the last digits.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2"])
def test_outputs_and_gradients_equal_the_dense_model(name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    model = trained(name, dtype, **options)
    rebuilt = dense_model(model)
    assert worst_difference(outputs(model), outputs(rebuilt)) < TOLERANCE[dtype]
    ours = gradients(model)
    loss(rebuilt).backward()
    expected = dense_gradients_by_peft_name(rebuilt)
    assert ours.keys() == expected.keys()
    for parameter in ours:
        assert worst_difference(ours[parameter], expected[parameter]) < TOLERANCE[dtype], parameter


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_outputs_of_models_with_a_float32_norm_equal_the_dense_model(name: str) -> None:
    model = trained(name)
    assert worst_difference(outputs(model), outputs(dense_model(model))) < 1e-5


@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_dora_with_the_same_low_rank_factors_gives_the_same_outputs_and_gradients(
    name: str, direction: str
) -> None:
    model = trained(name, direction=direction, detach_norm=True, projection_init="kaiming_uniform")
    rank = model.peft_config["default"].r
    oracle = get_peft_model(
        MODELS[name](),
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=LAYERS[name],
            use_dora=True,
            fan_in_fan_out=name == "gpt2",
        ),
    )
    for layer_name, layer in dvora_layers(model):
        magnitude, lambda_b, lambda_d = layer.vectors("default")
        adapted = layer.adapted("default")
        A = adapted.shared.A(rank, layer.in_features)
        B = adapted.shared.B(rank, layer.out_features)
        beta = lambda_b * adapted.w if direction == "unit" else lambda_b
        dora = oracle.get_submodule(f"base_model.model.{layer_name}")
        with torch.no_grad():
            dora.lora_A["default"].weight.copy_(lambda_d[:, None] * A)
            dora.lora_B["default"].weight.copy_(beta[:, None] * B)
            dora.lora_magnitude_vector["default"].weight.copy_(
                magnitude.view_as(dora.lora_magnitude_vector["default"].weight)
            )
    assert worst_difference(outputs(model), outputs(oracle)) < 1e-5
    ours, theirs = gradients(model), gradients(oracle)
    for layer_name, layer in dvora_layers(model):
        prefix = f"base_model.model.{layer_name}"
        magnitude = theirs[f"{prefix}.lora_magnitude_vector.default.weight"].flatten()
        assert worst_difference(ours[f"{prefix}.dvora_magnitude.default"], magnitude) < 1e-5, layer_name
        adapted = layer.adapted("default")
        A = adapted.shared.A(rank, layer.in_features)
        lambda_d = (theirs[f"{prefix}.lora_A.default.weight"] * A).sum(1)
        assert worst_difference(ours[f"{prefix}.dvora_lambda_d.default"], lambda_d) < 1e-5, layer_name
        beta = (theirs[f"{prefix}.lora_B.default.weight"] * adapted.shared.B(rank, layer.out_features)).sum(1)
        lambda_b = beta * adapted.w if direction == "unit" else beta
        assert worst_difference(ours[f"{prefix}.dvora_lambda_b.default"], lambda_b) < 1e-5, layer_name


def test_alpha_and_ranks_by_layer_follow_the_patterns() -> None:
    config = DVoRAConfig(
        r=6,
        alpha=3,
        target_modules=["lin0", "lin1", "lin2"],
        rank_pattern={"lin1": 9, "^lin2": 2},
        alpha_pattern={"lin1": 18, "lin2": 5},
    )
    model = get_peft_model(MODELS["mlp"](), config)
    adapted = {name: layer.adapted("default") for name, layer in dvora_layers(model)}
    assert {name: each.rank for name, each in adapted.items()} == {"lin0": 6, "lin1": 9, "lin2": 2}
    assert {name: each.scaling for name, each in adapted.items()} == {"lin0": 0.5, "lin1": 2.0, "lin2": 2.5}


def test_dropout_drops_inputs_of_the_update_and_not_of_the_gain() -> None:
    model = trained("mlp", dvora_dropout=0.5).train()
    x = torch.randn(8, 10)
    layer = model.get_submodule("base_model.model.lin0")
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.dvora_lambda_b["default"].zero_()
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))
