"""A whole adapted model against the same model rebuilt with dense float64 layers, and against PEFT's DoRA."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dvora import DVoRAConfig
from tests.peft.dense import dense_gradients_by_peft_name, dense_model
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, loss, outputs, train_vectors

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


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dropout_is_off_in_eval_mode(name: str) -> None:
    assert torch.equal(outputs(trained(name, dvora_dropout=0.5).eval()), outputs(trained(name)))


def test_dropout_drops_inputs_of_the_update_and_not_of_the_gain() -> None:
    model = trained("mlp", dvora_dropout=0.5).train()
    x = torch.randn(8, 10)
    layer = model.get_submodule("base_model.model.lin0")
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.dvora_lambda_b["default"].zero_()
    assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))
