"""Which layers an adapter targets, compared with LoRA's choice; and targets that match nothing."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dvora import DVoRAConfig
from dvora.peft import DVoRAModel
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

SELECTIONS = [
    pytest.param("bert", {"target_modules": "all-linear"}, id="all-linear"),
    pytest.param("llama", {"target_modules": "all-linear"}, id="all-linear of a causal model"),
    pytest.param("gpt2", {"target_modules": "all-linear"}, id="all-linear of Conv1D"),
    pytest.param("t5", {"target_modules": "all-linear"}, id="all-linear of an encoder and decoder"),
    pytest.param("bert", {}, id="default of bert"),
    pytest.param("llama", {}, id="default of llama"),
    pytest.param("gpt2", {}, id="default of gpt2"),
    pytest.param("t5", {}, id="default of t5"),
    pytest.param("llama", {"target_modules": r".*layers\.1\..*(q|v)_proj"}, id="expression"),
    pytest.param("bert", {"target_modules": ["query", "1.attention.self.key"]}, id="list"),
    pytest.param("mlp", {"target_modules": ["lin0"]}, id="a layer of the model itself"),
    pytest.param("bert", {"target_modules": ["query", "key"], "layers_to_transform": [1]}, id="layers_to_transform"),
    pytest.param(
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        id="layers_pattern",
    ),
    pytest.param("bert", {"target_modules": "all-linear", "exclude_modules": ["dense"]}, id="exclude_modules"),
    pytest.param(
        "llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*layers\.0.*"}, id="excluded expression"
    ),
    pytest.param("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}, id="modules_to_save"),
]


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
def test_the_layers_are_those_of_lora(name: str, selection: dict[str, object]) -> None:
    ours = get_peft_model(MODELS[name](), DVoRAConfig(r=4, **copy.deepcopy(selection)))
    theirs = get_peft_model(MODELS[name](), LoraConfig(r=4, fan_in_fan_out=name == "gpt2", **selection))
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert [layer for layer, _ in dvora_layers(ours)] == ours.targeted_module_names


@pytest.mark.parametrize(("name", "selection"), SELECTIONS)
def test_a_saved_adapter_finds_the_same_layers(name: str, selection: dict[str, object], tmp_path: Path) -> None:
    model = get_peft_model(MODELS[name](), DVoRAConfig(r=4, **copy.deepcopy(selection)))
    train_vectors(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path)
    assert loaded.targeted_module_names == model.targeted_module_names
    assert same_bits(outputs(loaded), outputs(model.eval()))


@pytest.mark.parametrize("architecture", sorted(TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING))
def test_every_architecture_has_pefts_default_targets(architecture: str) -> None:
    expected = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING[architecture]
    assert DVoRAModel.target_module_mapping[architecture] == expected


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


def test_an_unknown_architecture_needs_target_modules() -> None:
    base = MODELS["mlp"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(base, DVoRAConfig(r=4))
    assert_unchanged(base, before)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        pytest.param({"target_modules": ["quary"]}, r"'quary' \(closest: query.*\)", id="nothing"),
        pytest.param(
            {"target_modules": ["zzzzzz"]}, r"layers that can be adapted: classifier, dense, key", id="unlike all"
        ),
        pytest.param({"target_modules": r".*\.quary"}, r"quary", id="expression"),
        pytest.param(
            {"target_modules": ["layer.7.attention.self.query"]}, r"layer\.7\.attention\.self\.query", id="path"
        ),
        pytest.param(
            {"target_modules": ["query"], "exclude_modules": ["query"]}, r"exclude_modules=\{'query'\}", id="excluded"
        ),
        pytest.param(
            {"target_modules": ["query"], "layers_to_transform": [9]}, r"layers_to_transform=\[9\]", id="index"
        ),
        pytest.param({"target_modules": []}, r"no layer is left to adapt", id="empty list"),
        pytest.param({"target_modules": ""}, r"target_modules", id="empty expression"),
    ],
)
@pytest.mark.parametrize("existing", [False, True], ids=["first adapter", "second adapter"])
def test_targets_that_match_nothing_are_refused_with_the_closest_names(
    selection: dict[str, object], message: str, existing: bool
) -> None:
    config = DVoRAConfig(r=4, **selection)
    model = MODELS["bert"]()
    if existing:
        model = get_peft_model(model, DVoRAConfig(r=4, target_modules=LAYERS["bert"]))
        train_vectors(model)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        model.add_adapter("second", config) if existing else get_peft_model(model, config)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)


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


def test_an_invalid_expression_is_refused_and_leaves_the_model_as_it_was() -> None:
    base = MODELS["mlp"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"target_modules: 'lin\(0' is not a regular expression: missing \)"):
        get_peft_model(base, DVoRAConfig(r=4, target_modules="lin(0"))
    assert_unchanged(base, before)
