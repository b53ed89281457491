"""Putting adapters into a model: which weights names match, what is refused, and that the model is left as it was."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from dvora import DVoRAConfig
from dvora.peft.layer import DVoRALayer
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

# Which weights.


SELECTIONS = [
    ("bert", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": "all-linear"}),
    ("bert", {}),
    ("mlp", {"target_modules": ["lin0"]}),
    ("bert", {"target_modules": ["query", "key"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"}),
    ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
]


@pytest.mark.parametrize(("name", "selection"), SELECTIONS, ids=str)
def test_the_layers_are_those_of_lora_and_found_again_by_a_load(
    name: str, selection: dict[str, object], tmp_path: Path
) -> None:
    model = get_peft_model(MODELS[name](), DVoRAConfig(r=4, **copy.deepcopy(selection)))
    theirs = get_peft_model(MODELS[name](), LoraConfig(r=4, fan_in_fan_out=name == "gpt2", **selection))
    assert model.targeted_module_names == theirs.targeted_module_names
    assert [layer for layer, _ in dvora_layers(model)] == model.targeted_module_names
    train_vectors(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path)
    assert loaded.targeted_module_names == model.targeted_module_names
    assert same_bits(outputs(loaded), outputs(model.eval()))


class OneOfTwoNames(nn.Module):
    """A model of an architecture for which PEFT's default lists more names than this member of it has."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "blip-2"}
        self.q, self.v = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v(self.q(x))


def test_an_adapter_on_default_targets_can_be_loaded_where_some_of_their_names_are_missing(tmp_path: Path) -> None:
    base = OneOfTwoNames()
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=2))
    assert model.targeted_module_names == ["q", "v"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.targeted_module_names == ["q", "v"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"target_modules": ["quary"]}, r"'quary' \(closest: query.*\)"),
        ({"target_modules": ["zzzzzz"]}, r"layers that can be adapted: classifier, dense, key"),
        ({"target_modules": ["layer.7.attention.self.query"]}, r"layer\.7\.attention\.self\.query"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, r"exclude_modules=\{'query'\}"),
        ({"target_modules": ["query"], "layers_to_transform": [9]}, r"layers_to_transform=\[9\]"),
        ({"target_modules": []}, r"no layer is left to adapt"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_are_refused_with_the_closest_names(
    selection: dict[str, object], message: str
) -> None:
    model = MODELS["bert"]()
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        get_peft_model(model, DVoRAConfig(r=4, **selection))
    assert_unchanged(model, snapshot(MODELS["bert"]()))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["query", "quary"], r"named 'quary' \(closest: query.*\)\. Only the 2 weights that match are adapted"),
        (["query", "valeu", "keys"], r"'keys' \(closest: key.*\); 'valeu' \(closest: value"),
    ],
)
def test_names_that_match_nothing_beside_others_that_do_are_warned_of(names: list[str], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        model = get_peft_model(MODELS["bert"](), DVoRAConfig(r=4, target_modules=names))
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"query"}


# What is refused.


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


ATTENTION = {"dvora_dropout": 0.1}
PARAMETER = {"target_modules": ["first"], "target_parameters": ["middle.scale"]}
PARAMETRIZED = {"target_modules": [], "target_parameters": ["middle.weight"]}
TWICE = {"target_modules": ["last"], "target_parameters": ["last.weight"]}
NOWHERE = {"target_modules": ["mdidle"]}
ANOTHER_BASE = {"base_probes": {"middle": [100.0] * 5}}

# What is in the middle, the error, what it says of layer, reason and remedy, and the settings where they matter.
REFUSALS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str, dict[str, object]]] = {
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 6, 1), TypeError,
        "middle of type ConvTranspose2d is not supported; supported layers: ", {}),
    "normalisation": (lambda: nn.LayerNorm(6), TypeError,
        "middle of type LayerNorm is not supported; supported layers: ", {}),
    "renormalised embedding": (lambda: nn.Embedding(6, 6, max_norm=1.0), ValueError,
        "middle: the embedding renormalises its table in every pass .*set max_norm=None, or leave", {}),
    "positional embedding": (lambda: BartLearnedPositionalEmbedding(6, 6), TypeError,
        "middle .*does more than look its entries up.*exclude_modules", {}),
    "not linear": (lambda: Squared(6, 6), TypeError,
        "middle of type Squared is not linear .*off by .*%.*leave it out with exclude_modules", {}),
    "two inputs": (Pair, TypeError,
        "middle of type Pair does not take vectors of its 6 input features .*leave it out with exclude_modules", {}),
    "uninitialised": (lambda: nn.LazyLinear(6), TypeError, "middle: the base weight is a UninitializedParameter", {}),
    "integers": (lambda: with_weight(torch.zeros(6, 6, dtype=torch.int8)), TypeError,
        "middle: the base weight has dtype torch.int8", {}),
    "no values": (lambda: with_weight(torch.empty(0, 6)), ValueError,
        r"middle: the base weight has shape \(0, 6\): there is nothing", {}),
    "not finite": (lambda: with_weight(torch.full((6, 6), torch.inf)), ValueError,
        "middle: 6 of 6 rows of the base weight have no finite norm .*repair the base model", {}),
    "meta": (lambda: nn.Linear(6, 6, device="meta"), ValueError, "middle: the base weight is on the meta device", {}),
    "dropout of a weight that is read": (lambda: nn.MultiheadAttention(6, 2), ValueError,
        r"middle\.in_proj_weight: dvora_dropout=0.1 drops inputs .*set dvora_dropout=0, or leave it out", ATTENTION),
    "parameter with one dimension": (Scale, TypeError,
        r"middle\.scale has shape \(6,\); DVoRA adapts matrices", PARAMETER),
    "parametrized parameter": (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), ValueError,
        r"nothing .* is named 'middle\.weight'.* \(a parametrized weight is no parameter; name its", PARAMETRIZED),
    "parameter of a targeted layer": (lambda: nn.Linear(6, 6), ValueError,
        "last.weight cannot be wrapped, because its layer is targeted by target_modules too", TWICE),
    "unknown name": (lambda: nn.Linear(6, 6), ValueError,
        r"nothing in the model is named 'mdidle' \(closest: middle\)", NOWHERE),
    "another base": (lambda: nn.Linear(6, 6), ValueError, "middle: .*another base model", ANOTHER_BASE),
}  # fmt: skip


# `inject_adapter_in_model` enters names of its own, before any tuner is asked.
WAYS: list[Callable[[nn.Module, DVoRAConfig], object]] = [
    get_peft_model,
    lambda model, config: inject_adapter_in_model(config, model),
]


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_layer_leaves_the_model_and_its_adapters_alone(case: str) -> None:
    middle, error, message, settings = REFUSALS[case]
    config = DVoRAConfig(**{"r": 4, "target_modules": ["first", "middle", "last"], **settings})
    for adapt in WAYS:
        model = Model(middle())
        before = _held(model)
        with pytest.raises(error, match=message):
            adapt(model, copy.deepcopy(config))
        assert _held(model) == before
    model = get_peft_model(Model(middle()), DVoRAConfig(r=4, target_modules=["first"], bias="dvora_only"))
    train_vectors(model)
    before = _held(model)
    with pytest.raises(error, match=message):
        model.add_adapter("second", config)
    assert _held(model) == before
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", DVoRAConfig(r=3, target_modules=["first", "last"]))


def _held(model: nn.Module) -> dict[str, object]:
    """Types, keys and values of a model, also where a value cannot be read."""
    held: dict[str, object] = {name: type(module) for name, module in model.named_modules()}
    for name, value in model.named_parameters():
        readable = not value.is_meta and "Uninitialized" not in type(value).__name__
        held[f"{name} value"] = value.detach().float().nan_to_num(7).tolist() if readable else type(value)
        held[f"{name} trained"] = value.requires_grad
    return held


def test_a_base_that_carries_a_lora_adapter_is_refused() -> None:
    lora = get_peft_model(MODELS["bert"](), LoraConfig(r=4, target_modules=LAYERS["bert"]))
    model = lora.base_model.model
    before, expected = snapshot(model), outputs(model)
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`|for a second time"),
        pytest.raises(TypeError, match=r"already carries an adapter of another method \(lora\)"),
    ):
        get_peft_model(model, DVoRAConfig(r=4, target_modules=LAYERS["bert"]))
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    assert list(lora.peft_config) == ["default"]
    assert isinstance(lora.peft_config["default"], LoraConfig)


@pytest.mark.filterwarnings("error")
def test_fan_in_fan_out_on_a_linear_layer_is_ignored_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"fan_in_fan_out=True is ignored: lin\d is a torch\.nn\.Linear"):
        model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], fan_in_fan_out=True))
    assert same_bits(outputs(model), outputs(MODELS["mlp"]()))


def test_biases_of_two_adapters_are_refused_as_by_lora() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], bias="dvora_only"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0"], bias="all"))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


class Twice(nn.Module):
    """A layer that is called from two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.block.append(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.first(x))


def test_a_layer_in_several_places_is_refused_by_all_its_names_and_not_where_it_is_left_out() -> None:
    model = Twice()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"first is one module in several places \(first, block.2\)"):
        get_peft_model(model, DVoRAConfig(r=2, target_modules="all-linear"))
    assert_unchanged(model, before)
    get_peft_model(model, DVoRAConfig(r=2, target_modules="all-linear", exclude_modules=["first"]))


def test_a_part_that_is_called_from_two_places_is_adapted_in_both() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = get_peft_model(nn.Sequential(inner, inner), DVoRAConfig(r=2, target_modules=["0.0"], init_weights=False))
    assert isinstance(model.base_model.model[1][0], DVoRALayer)


def test_what_is_added_while_adapters_are_disabled_freezes_no_other(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=2, target_modules=["lin0", "lin1"]), adapter_name="first")
    model.save_pretrained(tmp_path)
    model.base_model.disable_adapter_layers()
    model.load_adapter(tmp_path / "first", "second", is_trainable=True)
    model.add_adapter("third", DVoRAConfig(r=3, target_modules=["lin0"]))
    for _, layer in dvora_layers(model):
        for name in layer.dvora_magnitude:
            assert all(vector.requires_grad == (name == "second") for vector in layer.vectors(name)), name
