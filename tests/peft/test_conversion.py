"""Conversions give the same outputs and merged weights, in any process, or are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.peft.conversion import from_vera, to_dora
from tests.peft.layer_cases import CASES, Case
from tests.peft.tiny import LAYERS, MODELS, outputs, train_vectors

# PEFT warns of what this very conversion checks, and of GPT-2's layout.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]


def vera(base: nn.Module, target_modules: list[str], **settings: object) -> PeftModel:
    config = VeraConfig(**{"r": 6, "target_modules": target_modules, **settings})
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 3e-6 * expected.norm()


def same_state(model: nn.Module, expected: nn.Module) -> None:
    for key, value in expected.state_dict().items():
        close(model.state_dict()[key], value)


def test_matrices_of_another_machine_are_refused(tmp_path: Path) -> None:
    trained = vera(MODELS["mlp"](), ["lin0"])
    trained.base_model.vera_B["default"][0, 0] *= 1 + 2**-20
    with pytest.raises(ValueError, match=r"vera_B of the adapter is not what projection_prng_key=0 gives here"):
        from_vera(trained)


def test_merged_adapters_and_other_methods_are_refused() -> None:
    model = vera(MODELS["mlp"](), ["lin0"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="lin0: the adapter is merged"):
        from_vera(model)
    lora = get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(TypeError, match="expected an adapter of PEFT's VeRA"):
        from_vera(lora)


def test_a_layer_larger_than_the_matrices_is_refused_before_the_model_changes() -> None:
    base = MODELS["mlp"]()
    config = DVoRAConfig(r=4, target_modules=["lin1"], projection_init="peft_vera(r=4, in=20, out=24)")
    with pytest.raises(ValueError, match="rank 4 for at most 20 inputs; this layer needs rank 4 and 24"):
        get_peft_model(base, config)
    assert type(base.lin1) is nn.Linear


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
    "Conv3d": "no grouped convolutions",
    "MultiheadAttention": "its module reads the weight",
    "experts (E, out, in)": "its module reads the weight",
}

# By the names of the first and the last target.
SETTINGS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "plain": lambda *_: {},
    "weight": lambda *_: {"direction": "weight", "alpha": 3.0},
    "strength": lambda first, last: {"strength": {first: 0.4, last: -1.5}},
    "ranks": lambda first, last: {"rank_pattern": {first: 3, last: 9}, "alpha_pattern": {last: 2.0}},
    "magnitude": lambda _, last: {"magnitude_modules": [last], "strength": 0.5},
    "groups": lambda *_: {"lambda_d_groups": 7},
    "groups and ranks": lambda first, last: {"lambda_d_groups": 4, "rank_pattern": {first: 3, last: 9}, "alpha": 3.0},
}


def trained(base: nn.Module, config: DVoRAConfig) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), config)
    train_vectors(model)
    return model.eval()


@torch.no_grad()
def case_outputs(case: Case, model: nn.Module) -> Tensor:
    return model(case.inputs())


@pytest.mark.parametrize("name", MODELS)
def test_vera_becomes_dvora_with_the_same_outputs_and_merged_weights(name: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    trained = vera(base, LAYERS[name], save_projection=name < "h", projection_prng_key=7)
    trained.save_pretrained(tmp_path / "vera")
    from_vera(loaded(base, tmp_path / "vera")).save(tmp_path / "dvora")
    model = loaded(base, tmp_path / "dvora")
    assert (outputs(model) - outputs(base)).abs().max() > 1e-2
    close(outputs(model), outputs(trained))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(loaded(base, tmp_path / "again")), outputs(model))
    same_state(model.merge_and_unload(), trained.merge_and_unload())


@pytest.mark.parametrize(
    ("name", "settings"), [*((name, "plain") for name in MODELS), *(("llama", each) for each in SETTINGS)]
)
def test_dvora_becomes_dora_with_the_same_outputs_and_merged_weights(name: str, settings: str, tmp_path: Path) -> None:
    base, targets = MODELS[name](), LAYERS[name]
    model = trained(base, DVoRAConfig(r=5, target_modules=targets, **SETTINGS[settings](targets[0], targets[-1])))
    to_dora(model).save(tmp_path)
    dora = loaded(base, tmp_path)
    assert isinstance(dora.peft_config["default"], LoraConfig)
    # Groups or not, the rank stays.
    assert dora.peft_config["default"].r == 5
    assert (outputs(model) - outputs(MODELS[name]())).abs().max() > 1e-2
    close(outputs(dora), outputs(model))
    same_state(dora.merge_and_unload(), model.merge_and_unload())


@pytest.mark.parametrize("bias", ["none", "all", "only"])
@pytest.mark.parametrize("direction", ["from vera", "to dora"])
def test_what_is_trained_beside_the_vectors_comes_along(direction: str, bias: str, tmp_path: Path) -> None:
    base, settings = MODELS["bert"](), {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    if direction == "from vera":
        model = vera(base, bias="vera_only" if bias == "only" else bias, **settings)
        from_vera(model).save(tmp_path)
    else:
        model = trained(base, DVoRAConfig(r=4, bias="dvora_only" if bias == "only" else bias, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dim() < 3:
                    parameter.add_(0.01 * torch.arange(parameter.numel()).view_as(parameter) / parameter.numel())
        to_dora(model).save(tmp_path)
    close(outputs(loaded(base, tmp_path)), outputs(model))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", CONVERTED)
def test_layer_types_give_the_same_outputs(name: str, groups: int, tmp_path: Path) -> None:
    case = CASES[name]
    model = trained(case.base(), case.config(lambda_d_groups=groups))
    to_dora(model).save(tmp_path)
    dora = loaded(case.base(), tmp_path)
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
    with pytest.raises(ValueError, match=r"lin1: PEFT's DoRA divides .* merge the adapter instead"):
        to_dora(model)


def test_a_layer_whose_name_ends_another_name_is_the_only_one_converted(tmp_path: Path) -> None:
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "block": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    model = trained(base, DVoRAConfig(r=2, target_modules="lin"))
    converted = to_dora(model)
    converted.save(tmp_path)
    dora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert [name for name, module in dora.base_model.model.named_modules() if hasattr(module, "lora_A")] == ["lin"]
