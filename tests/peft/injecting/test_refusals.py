"""Everything that is not supported: one clear sentence with layer, reason and what to do, and a model left alone."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import MODELS, outputs, same_bits, train_vectors


class Model(nn.Module):
    """A layer that can be adapted, one that perhaps cannot, and one that can."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.middle = middle
        self.last = nn.Linear(6, 6)


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Pair(nn.Module):
    """States the sizes of a linear layer and wants two inputs."""

    in_features = out_features = 6

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))


def with_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Refusal(NamedTuple):
    """A layer or a setting that is refused before the model is touched."""

    middle: Callable[[], nn.Module]
    message: str
    """Layer, reason, and what to do instead."""
    error: type[Exception] = TypeError
    settings: Mapping[str, object] = MappingProxyType({})


REFUSALS = {
    "transposed convolution": Refusal(
        lambda: nn.ConvTranspose2d(6, 6, 1), "middle of type ConvTranspose2d is not supported; supported layers: "
    ),
    "bag of embeddings": Refusal(lambda: nn.EmbeddingBag(6, 6), "middle of type EmbeddingBag is not supported; "),
    "normalisation": Refusal(lambda: nn.LayerNorm(6), "middle of type LayerNorm is not supported; supported layers: "),
    "renormalised embedding": Refusal(
        lambda: nn.Embedding(6, 6, max_norm=1.0),
        "middle: the embedding renormalises its table in every pass .*set max_norm=None, or leave",
        ValueError,
    ),
    "positional embedding": Refusal(
        lambda: BartLearnedPositionalEmbedding(6, 6), "middle .*does more than look its entries up.*exclude_modules"
    ),
    "not linear": Refusal(
        lambda: Squared(6, 6), r"middle of type Squared is not linear .*off by .*%.*leave it out with exclude_modules"
    ),
    "two inputs": Refusal(
        Pair, "middle of type Pair does not take vectors of its 6 input features .*leave it out with exclude_modules"
    ),
    "uninitialised": Refusal(lambda: nn.LazyLinear(6), "middle: the base weight is a UninitializedParameter"),
    "integers": Refusal(
        lambda: with_weight(torch.zeros(6, 6, dtype=torch.int8)), "middle: the base weight has dtype torch.int8"
    ),
    "eight bits": Refusal(
        lambda: with_weight(torch.zeros(6, 6).to(torch.float8_e4m3fn)), "middle: the base weight has dtype torch.float8"
    ),
    "not finite": Refusal(
        lambda: with_weight(torch.full((6, 6), torch.inf)),
        "middle: 6 of 6 rows of the base weight have no finite norm .*repair the base model",
        ValueError,
    ),
    "meta": Refusal(
        lambda: nn.Linear(6, 6, device="meta"), "middle: the base weight is on the meta device; load", ValueError
    ),
    "dropout of a weight that is read": Refusal(
        lambda: nn.MultiheadAttention(6, 2),
        r"middle\.in_proj_weight: dvora_dropout=0.1 drops inputs .*set dvora_dropout=0, or leave it out",
        ValueError,
        {"dvora_dropout": 0.1},
    ),
    "parameter with one dimension": Refusal(
        Scale,
        r"middle\.scale has shape \(6,\); DVoRA adapts matrices",
        TypeError,
        {"target_modules": ["first"], "target_parameters": ["middle.scale"]},
    ),
    "parametrized parameter": Refusal(
        lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
        r"no parameter is named middle\.weight \(a parametrized weight is no parameter; name its layer in target",
        ValueError,
        {"target_modules": [], "target_parameters": ["middle.weight"]},
    ),
    "parameter of a targeted layer": Refusal(
        lambda: nn.Linear(6, 6),
        "first.weight cannot be wrapped, because its layer is targeted by target_modules too",
        ValueError,
        {"target_modules": ["first"], "target_parameters": ["first.weight"]},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("adapt", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_a_refused_layer_leaves_the_model_alone(case: str, adapt: Callable[[nn.Module, DVoRAConfig], object]) -> None:
    refusal = REFUSALS[case]
    model = Model(refusal.middle())
    before = _held(model)
    config = DVoRAConfig(**{"r": 4, "target_modules": ["first", "middle", "last"], **refusal.settings})
    with pytest.raises(refusal.error, match=refusal.message):
        adapt(model, config)
    assert _held(model) == before


@pytest.mark.parametrize("case", [name for name, refusal in REFUSALS.items() if "first" not in str(refusal.settings)])
def test_a_refused_layer_leaves_adapters_alone_that_are_there(case: str) -> None:
    refusal = REFUSALS[case]
    model = get_peft_model(Model(refusal.middle()), DVoRAConfig(r=4, target_modules=["first", "last"]))
    train_vectors(model)
    before = _held(model)
    with pytest.raises(refusal.error, match=refusal.message):
        model.add_adapter("second", DVoRAConfig(**{"r": 4, "target_modules": ["first", "middle"], **refusal.settings}))
    assert _held(model) == before
    assert list(model.peft_config) == ["default"]


ACTIONS: dict[str, tuple[Callable[[PeftModel], object], type[Exception], str]] = {
    "unknown adapter in a batch": (
        lambda m: outputs(m, adapter_names=["default", "third", "default", "default"]),
        ValueError,
        "adapter_names: no adapter is named third",
    ),
    "batch in training mode": (
        lambda m: outputs(m.train(), adapter_names=["default"] * 4),
        ValueError,
        r"adapter_names works for inference only; call model\.eval\(\) first",
    ),
    "batch of another length": (
        lambda m: outputs(m, adapter_names=["default"] * 3),
        ValueError,
        "adapter_names has 3 entries, the batch has 4 rows; pass one name a row",
    ),
    "adapter of an unknown type": (
        lambda m: m.add_adapter("third", object()),
        AttributeError,
        "peft_type",
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_refused_action_leaves_the_model_alone(action: str) -> None:
    act, error, message = ACTIONS[action]
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0", "lin1"])).eval()
    train_vectors(model)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(error, match=message):
        act(model)
    assert_unchanged(model, before)
    assert same_bits(outputs(model.eval()), expected)


def _held(model: nn.Module) -> dict[str, object]:
    """Types, keys and values of a model, also where a value cannot be read."""
    held: dict[str, object] = {name: type(module) for name, module in model.named_modules()}
    for name, value in model.named_parameters():
        readable = not value.is_meta and "Uninitialized" not in type(value).__name__
        held[f"{name} value"] = value.detach().float().nan_to_num(7).tolist() if readable else type(value)
        held[f"{name} trained"] = value.requires_grad
    return held
