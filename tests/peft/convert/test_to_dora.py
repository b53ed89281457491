"""A DVoRA adapter written out as one of PEFT's DoRA gives the same outputs and merged weights, in any process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.peft.conversion import to_dora
from tests.peft.convert.fresh_process import run_fresh
from tests.peft.layer_cases import CASES, Case
from tests.peft.tiny import LAYERS, MODELS, outputs, train_vectors

CONVERTED = [
    "Linear",
    "transformers Conv1D",
    "Conv2d",
    "Embedding",
    "Embedding, padding",
    "Embedding, scaled",
    "Linear, magnitude only",
]
REFUSED = {
    "Linear, weight_norm": "it computes its weight in every pass",
    "Conv1d": "ignore dilation",
    "Conv1d, groups, circular": "no grouped convolutions",
    "Conv2d, depthwise": "no grouped convolutions",
    "Conv3d": "no grouped convolutions",
    "MultiheadAttention": "its module reads the weight",
    "experts (E, out, in)": "its module reads the weight",
}
SETTINGS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "plain": lambda *_: {},
    "weight": lambda *_: {"direction": "weight", "alpha": 3.0},
    "strength": lambda first, last: {"strength": {first: 0.4, last: -1.5}},
    "ranks": lambda first, last: {"rank_pattern": {first: 3, last: 9}, "alpha_pattern": {last: 2.0}},
    "structured": lambda *_: {"projection_init": "structured"},
    "magnitude": lambda _, last: {"magnitude_modules": [last], "strength": 0.5},
}
"""By the names of the first and the last target."""


def trained(base: nn.Module, config: DVoRAConfig) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), config)
    train_vectors(model)
    return model.eval()


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 3e-6 * expected.norm()


@torch.no_grad()
def case_outputs(case: Case, model: nn.Module) -> Tensor:
    return model(case.inputs())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_outputs_and_merged_weights(name: str, settings: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    targets = LAYERS[name]
    model = trained(base, DVoRAConfig(r=5, target_modules=targets, **SETTINGS[settings](targets[0], targets[-1])))
    to_dora(model).save(tmp_path)
    dora = load_dora(base, tmp_path)
    assert isinstance(dora.peft_config["default"], LoraConfig)
    assert (outputs(model) - outputs(MODELS[name]())).abs().max() > 1e-2
    close(outputs(dora), outputs(model))
    merged, expected = dora.merge_and_unload(), model.merge_and_unload()
    for key, value in expected.state_dict().items():
        close(merged.state_dict()[key], value)


@pytest.mark.parametrize("name", CONVERTED)
def test_layer_types_give_the_same_outputs(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = trained(case.base(), case.config())
    to_dora(model).save(tmp_path)
    dora = load_dora(case.base(), tmp_path)
    close(case_outputs(case, dora), case_outputs(case, model))
    close(case_outputs(case, dora.merge_and_unload()), case_outputs(case, model))


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_pefts_dora_does_not_have_are_refused(name: str) -> None:
    model = trained(CASES[name].base(), CASES[name].config())
    with pytest.raises(TypeError, match=f"cannot be converted to DoRA: .*{REFUSED[name]}"):
        to_dora(model)


def test_a_row_of_zeros_is_refused() -> None:
    base = MODELS["mlp"]()
    with torch.no_grad():
        base.lin1.weight[3] = 0
    model = trained(base, DVoRAConfig(r=4, target_modules=["lin1"]))
    with pytest.raises(ValueError, match=r"lin1: PEFT's DoRA divides .* convert to dense instead"):
        to_dora(model)


@pytest.mark.parametrize("bias", ["none", "all", "dvora_only"])
def test_what_is_trained_beside_the_vectors_comes_along(bias: str, tmp_path: Path) -> None:
    base = MODELS["bert"]()
    model = trained(base, DVoRAConfig(r=4, target_modules=["query"], bias=bias, task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() < 3:
                parameter.add_(0.01 * torch.arange(parameter.numel()).view_as(parameter) / parameter.numel())
    to_dora(model).save(tmp_path)
    close(outputs(load_dora(base, tmp_path)), outputs(model))


def test_a_layer_whose_name_ends_another_name_is_the_only_one_converted(tmp_path: Path) -> None:
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "block": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    model = trained(base, DVoRAConfig(r=2, target_modules="lin"))
    converted = to_dora(model)
    converted.save(tmp_path)
    dora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [name for name, module in dora.base_model.model.named_modules() if hasattr(module, "lora_A")] == ["lin"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_process_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    model = trained(base, DVoRAConfig(r=5, target_modules=LAYERS[name], strength=0.8))
    to_dora(model).save(tmp_path / "dora")
    here = load_dora(base, tmp_path / "dora")
    fresh = run_fresh(name, tmp_path / "dora", tmp_path)
    assert torch.equal(fresh["outputs"], outputs(here))
    assert torch.equal(fresh["merged"], outputs(here.merge_and_unload()))


def load_dora(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
