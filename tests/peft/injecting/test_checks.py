"""Base models that cannot be adapted: what the error says, and that the model is left as it was."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from dvora import DVoRAConfig
from dvora.peft import DVoRALayer
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors

SUPPORTED = r"supported layers: torch's Conv1d, .*torch's Linear, torch's MultiheadAttention, transformers's Conv1D"


class Mixed(nn.Module):
    """Linear layers around one of another type: an error half-way would leave some of them adapted."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = middle
        self.last = nn.Linear(6, 6)


def refuse(model: nn.Module, error: type[Exception], message: str, **options: object) -> None:
    """Adapting the model fails with these words and leaves no trace."""
    before = snapshot(model)
    config = DVoRAConfig(**{"r": 4, "target_modules": ["first", "middle", "last"], **options})
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert_unchanged(model, before)
    with pytest.raises(error, match=message):
        inject_adapter_in_model(config, model)
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(6, 6, 1),
        nn.EmbeddingBag(6, 6),
        nn.LayerNorm(6),
        nn.Bilinear(6, 6, 6),
        nn.GRU(6, 6),
        nn.ReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_an_unsupported_layer_is_refused_with_the_supported_types(layer: nn.Module) -> None:
    name = type(layer).__name__
    refuse(Mixed(copy.deepcopy(layer)), TypeError, rf"middle of type {name} is not supported; {SUPPORTED}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_that_is_not_finite_is_refused_by_name(dtype: torch.dtype, value: float) -> None:
    model = Mixed(nn.Linear(6, 6)).to(dtype)
    with torch.no_grad():
        model.last.weight[[1, 4], 2] = value
    refuse(model, ValueError, r"last: 2 of 6 rows of the base weight have no finite norm")


def test_layers_that_are_not_targeted_may_be_anything() -> None:
    model = Mixed(nn.Linear(6, 6))
    with torch.no_grad():
        model.last.weight.fill_(float("nan"))
    get_peft_model(model, DVoRAConfig(r=4, target_modules=["first"]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_a_weight_that_is_not_floating_is_refused_by_name(dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=dtype), requires_grad=False)
    refuse(Mixed(layer), TypeError, rf"middle: the base weight has dtype {dtype}; DVoRA adapts floating-point weights")


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "one layer"])
def test_a_base_on_the_meta_device_is_refused_by_name(whole: bool) -> None:
    with torch.device("meta"):
        layer = nn.Linear(6, 6)
        model = Mixed(layer) if whole else None
    name = "first" if whole else "middle"
    refuse(model or Mixed(layer), ValueError, f"{name}: the base weight is on the meta device")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_base_that_carries_a_lora_adapter_is_refused(name: str) -> None:
    lora = get_peft_model(MODELS[name](), LoraConfig(r=4, target_modules=LAYERS[name], fan_in_fan_out=name == "gpt2"))
    model = lora.base_model.model
    before, expected = snapshot(model), outputs(model)
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`|for a second time"),
        pytest.raises(TypeError, match=r"already carries an adapter of another method \(lora\)"),
    ):
        get_peft_model(model, DVoRAConfig(r=4, target_modules=LAYERS[name]))
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    assert list(lora.peft_config) == ["default"]
    assert isinstance(lora.peft_config["default"], LoraConfig)


def test_a_layer_that_carries_a_lora_adapter_is_refused_when_injecting() -> None:
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["lin1"]), MODELS["mlp"]())
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(TypeError, match=r"lin1 already carries an adapter of another method \(lora\)"),
    ):
        inject_adapter_in_model(DVoRAConfig(r=4, target_modules=["lin0", "lin1"]), model, adapter_name="ours")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.filterwarnings("error")
def test_fan_in_fan_out_on_a_linear_layer_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is ignored: lin\d is a torch\.nn\.Linear"):
        model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], fan_in_fan_out=True))
    assert same_bits(outputs(model), outputs(MODELS["mlp"]()))


def failing_configs() -> list[object]:
    return [
        pytest.param({"target_modules": ["lni1"]}, ValueError, "lni1", id="unknown target"),
        pytest.param({"target_modules": ["lin0", "act"]}, TypeError, "act of type Tanh", id="unsupported layer"),
        pytest.param({"target_modules": ["lin0", "broken"]}, ValueError, "broken: 6 of 6 rows", id="NaN"),
        pytest.param({"target_modules": ["lin0"], "bias": "all"}, ValueError, "only 1 adapter with bias", id="bias"),
        pytest.param(
            {"target_modules": ["lin0"], "base_probes": {"lin0": [100.0] * 5}},
            ValueError,
            "another base model",
            id="base",
        ),
    ]


@pytest.mark.parametrize(("options", "error", "message"), failing_configs())
def test_a_failed_add_adapter_leaves_the_existing_adapter_as_it_was(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    base = MODELS["mlp"]()
    base.act, base.broken = nn.Tanh(), nn.Linear(6, 6)
    with torch.no_grad():
        base.broken.weight.fill_(float("nan"))
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin0", "lin1"], bias="dvora_only"))
    train_vectors(model)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(error, match=message):
        model.add_adapter("second", DVoRAConfig(r=3, **options))
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    assert list(model.peft_config) == ["default"]
    assert not any("second" in layer.dvora_adapted for layer in model.modules() if isinstance(layer, DVoRALayer))
    model.add_adapter("second", DVoRAConfig(r=3, target_modules=["lin0", "lin2"]))


def test_a_second_get_peft_model_on_an_adapted_model_adds_the_adapter_as_with_lora() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"]))
    with pytest.warns(UserWarning, match="for a second time|Already found a `peft_config`"):
        again = get_peft_model(model.base_model.model, DVoRAConfig(r=5, target_modules=["lin0"]), adapter_name="second")
    assert isinstance(again, PeftModel)
    assert set(again.get_submodule("base_model.model.lin0").dvora_adapted) == {"default", "second"}
