"""What is loaded into a merged model, or trained in it: refused before anything is changed, never lost silently."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor

import dvora
from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors


def adapted() -> PeftModel:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"])).eval()
    model.add_adapter("second", DVoRAConfig(r=3, target_modules=LAYERS["mlp"]))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    return model


def other_base() -> dict[str, Tensor]:
    """A state dict of the adapted model with other base weights."""
    model = adapted()
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.base_layer.weight.mul_(1.5)
    return model.state_dict()


def only(state_dict: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if part in key}


LOADS: dict[str, Callable[[PeftModel, Path], object]] = {
    "load_adapter over the name": lambda model, folder: model.load_adapter(folder, "default"),
    "a state dict of the adapter": lambda model, _: set_peft_model_state_dict(
        model, get_peft_model_state_dict(adapted()), "default"
    ),
    "an unmerged state dict": lambda model, _: model.load_state_dict(adapted().state_dict()),
    "a merged state dict": lambda model, _: model.load_state_dict(model.state_dict()),
    "another base": lambda model, _: model.load_state_dict(other_base()),
    "another base, assigned": lambda model, _: model.load_state_dict(other_base(), assign=True),
    "another base alone": lambda model, _: model.load_state_dict(only(other_base(), "base_layer"), strict=False),
    "one layer of another base": lambda model, _: model.load_state_dict(
        only(other_base(), "lin1.base_layer.weight"), strict=False
    ),
    "vectors alone": lambda model, _: model.load_state_dict(only(adapted().state_dict(), "default"), strict=False),
    "from within": lambda model, _: model.get_base_model().load_state_dict(
        {k.removeprefix("base_model.model."): v for k, v in other_base().items()}
    ),
    "hot swap": lambda model, folder: dvora.hotswap_adapter(model, folder),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_load_over_what_is_merged_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    other = adapted()
    train_vectors(other, "default", 5)
    other.save_pretrained(tmp_path, selected_adapters=["default"])
    model = adapted()
    own = snapshot(model)
    model.merge_adapter()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        LOADS[name](model, tmp_path)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    model.unmerge_adapter()
    assert_unchanged(model, own)
    LOADS[name](model, tmp_path)  # as the message says


def test_what_is_not_merged_can_be_loaded_while_something_is() -> None:
    model, other = adapted(), adapted()
    train_vectors(other, "second", 5)
    model.merge_adapter(["default"])
    expected = outputs(model)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other, adapter_name="second"), "second")
    model.load_state_dict(only(other.state_dict(), "lin0.base_layer.bias"), strict=False)
    assert same_bits(outputs(model), expected)
    model.unmerge_adapter()
    other.base_model.set_adapter("second")
    model.base_model.set_adapter("second")
    assert same_bits(outputs(model), outputs(other))


def test_a_layer_injected_in_place_refuses_too() -> None:
    model = inject_adapter_in_model(DVoRAConfig(r=4, target_modules=LAYERS["mlp"]), MODELS["mlp"]())
    train_vectors(model)
    state_dict = copy.deepcopy(model.state_dict())
    for _, layer in dvora_layers(model):
        layer.merge()
    with pytest.raises(
        ValueError, match=re.escape("lin0.base_layer.weight cannot be loaded while adapters are merged")
    ):
        model.load_state_dict(state_dict)


def test_training_a_merged_model_is_refused() -> None:
    model = adapted()
    with dvora.merged(model):
        model.train()
        with pytest.raises(RuntimeError, match=r"lin0: adapters are merged \(default\).*call unmerge_adapter first"):
            model(torch.zeros(2, 10))
        with torch.no_grad():
            model(torch.zeros(2, 10))
        model.eval()
        model(torch.zeros(2, 10)).sum()
    model.train()
    model(torch.zeros(2, 10)).sum().backward()
    assert all(layer.vectors("default").magnitude.grad is not None for _, layer in dvora_layers(model))


def test_a_merged_model_whose_adapter_is_frozen_may_be_trained() -> None:
    model = adapted()
    model.merge_adapter()
    for parameter in model.parameters():
        parameter.requires_grad_("bias" in dict(model.named_parameters()) or parameter.dim() == 2)
    for _, layer in dvora_layers(model):
        layer.set_requires_grad(["default"], False)
    model.train()
    model(torch.zeros(2, 10)).sum().backward()


def test_merged_for_good_is_said_where_it_matters() -> None:
    model = adapted()
    expected = outputs(model)
    dvora.peft.merging.merge_model(model, None, keep_original=False, safe_merge=False)
    assert torch.allclose(outputs(model), expected, atol=1e-6)
    with pytest.raises(ValueError, match="default were merged permanently"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="default were merged permanently"):
        next(dvora_layers(model))[1].unmerged()
    assert torch.allclose(outputs(model), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_strengths_and_sums_that_leave_the_range_are_refused_before_anything_is_changed(method: str) -> None:
    model = get_peft_model(MODELS["mlp"]().half(), DVoRAConfig(r=4, target_modules=LAYERS["mlp"])).eval()
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    model.set_strength({"lin2": 1e6}, "second")
    model.merge_adapter(["default"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lin2: merging default, second gives values that are .* too large for torch"):
        getattr(model, method)(adapter_names=["second"])
    assert_unchanged(model, before)
    assert {tuple(layer.merged_adapters) for _, layer in dvora_layers(model)} == {("default",)}


def test_a_large_magnitude_with_a_small_strength_merges() -> None:
    model = get_peft_model(MODELS["mlp"]().half(), DVoRAConfig(r=4, target_modules=LAYERS["mlp"])).eval()
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("default").magnitude.mul_(1e6)
    model.set_strength(1e-5)
    expected = outputs(model)
    model.merge_adapter()
    assert torch.allclose(outputs(model).float(), expected.float(), rtol=0.01, atol=0.05)


def test_a_warning_that_is_an_error_leaves_nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(MODELS["mlp"]().bfloat16(), DVoRAConfig(r=4, target_modules=LAYERS["mlp"])).eval()
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("default").magnitude.mul_(1 + 1e-4)
    before = snapshot(model)
    for merge in (model.merge_adapter, next(dvora_layers(model))[1].merge, model.merge_and_unload):
        with pytest.raises(dvora.MergePrecisionWarning):
            merge()
        assert_unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_original_follows_a_cast_and_a_copy(dtype: torch.dtype) -> None:
    model, cast = adapted(), adapted().to(dtype)
    model.merge_adapter()
    twin = copy.deepcopy(model).to(dtype)
    twin.unmerge_adapter()
    assert_unchanged(twin, snapshot(cast))
