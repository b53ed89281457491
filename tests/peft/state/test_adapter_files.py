"""Checks of an adapter's files before a model is touched."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from dvora import DVoRAConfig
from dvora.peft.saving import open_values
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.state.adapter_files import edit_config, edit_weights
from tests.peft.tiny import MODELS, outputs, same_bits, train_vectors

BIAS = "base_model.model.lin0.base_layer.bias"


def saved(folder: Path, bias: str) -> PeftModel:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], bias=bias)).eval()
    train_vectors(model)
    model.save_pretrained(folder)
    return model


def test_the_keys_are_those_of_the_file(tmp_path: Path) -> None:
    saved(tmp_path, "dvora_only")
    vectors = {f"base_model.model.lin0.dvora_{vector}" for vector in ("magnitude", "lambda_b", "lambda_d")}
    with open_values(tmp_path) as (shapes, _):
        assert set(shapes) == {BIAS, *vectors}


@pytest.mark.parametrize(
    ("bias", "key"),
    [("none", BIAS), ("dvora_only", "base_model.model.lin1.bias"), ("none", "base_model.model.lin1.bias")],
)
def test_a_file_cannot_overwrite_biases_that_its_configuration_does_not_train(
    bias: str, key: str, tmp_path: Path
) -> None:
    saved(tmp_path, "dvora_only")
    edit_config(tmp_path, bias=bias)
    edit_weights(tmp_path, lambda tensors: tensors.update({key: torch.ones(24)}))
    base = MODELS["mlp"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"the adapter's file has .*bias.*, which its configuration does not train"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_biases_in_a_state_dict_at_hand_are_taken_as_by_peft() -> None:
    source = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], bias="all")).eval()
    with torch.no_grad():
        source.base_model.model.lin1.bias.add_(1)
    target = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"])).eval()
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    assert same_bits(outputs(target), outputs(source))


def test_a_file_must_have_the_tokens_that_its_configuration_trains(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, trainable_token_indices=[6])
    base = MODELS["llama"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"lacks the tokens that trainable_token_indices=\[6\] says it trains"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
