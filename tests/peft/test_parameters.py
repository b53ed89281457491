"""Parameters that their modules read: experts, attention, torch's fused transformer layers."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from dvora import DVoRAConfig
from dvora.peft.layer import layers_in
from tests.peft.dense_weights import DenseModel
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import same_bits, train_vectors

FUSED = CASES["TransformerEncoderLayer"]


def adapted(*names: str) -> PeftModel:
    model = get_peft_model(FUSED.base(), DVoRAConfig(r=4, target_modules=list(names))).eval()
    train_vectors(model)
    return model


@pytest.mark.parametrize("name", ["linear1", "linear2", "out_proj", "self_attn"])
def test_no_fused_evaluation_passes_an_adapter_by(name: str) -> None:
    """As it does PEFT's LoRA on linear1, which trains, and evaluates as if it were not there."""
    model = adapted(name)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            found = model(FUSED.inputs())
            assert worst_difference(found, DenseModel(FUSED.base(), model)(FUSED.inputs())) < 1e-5
            assert worst_difference(found, FUSED.base()(FUSED.inputs())) > 1e-3


@torch.no_grad()
def test_merged_and_disabled_layers_are_fused_again() -> None:
    model = adapted("linear1")
    expected = model(FUSED.inputs())
    with model.disable_adapter():
        assert torch.equal(model(FUSED.inputs()), FUSED.base()(FUSED.inputs()))
    model.merge_adapter()
    assert worst_difference(model(FUSED.inputs()), expected) < 1e-5
    assert not model.base_model.model.block.linear1.weight.is_meta


def test_adapters_on_different_parameters_of_a_module_are_saved_and_loaded_apart(tmp_path: Path) -> None:
    case = CASES["experts (E, out, in)"]
    model = get_peft_model(case.base(), case.config(target_parameters=["experts.up"])).eval()
    model.add_adapter("second", case.config(target_parameters=["experts.down"]))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        model.base_model.set_adapter(name)
        loaded = PeftModel.from_pretrained(case.base(), folder).eval()
        assert same_bits(loaded(case.inputs()), model(case.inputs()))


def test_attention_reads_adapted_weights_from_outside_too() -> None:
    case = CASES["MultiheadAttention"]
    model = get_peft_model(case.base(), case.config()).eval()
    train_vectors(model)
    attention = model.base_model.model.attn
    assert attention.embed_dim == 16
    assert not torch.equal(attention.in_proj_weight, attention.base_layer.in_proj_weight)
    assert not torch.equal(attention.out_proj.weight, attention.out_proj.base_layer.weight)
    with pytest.raises(AttributeError, match="no_such_name"):
        attention.no_such_name  # noqa: B018


def test_all_linear_adapts_attentions_output_projection_to_effect() -> None:
    base, x = CASES["MultiheadAttention"].base(), CASES["MultiheadAttention"].inputs()
    model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=4, target_modules="all-linear")).eval()
    train_vectors(model)
    assert "attn.out_proj" in {layer.name for layer in layers_in(model)}
    with torch.no_grad():
        assert worst_difference(model(x), DenseModel(base, model)(x)) < 1e-5
        model.base_model.model.attn.out_proj.dvora_lambda_b["default"].zero_()
        assert worst_difference(model(x), DenseModel(base, model)(x)) < 1e-5
    model.add_adapter("second", DVoRAConfig(r=4, target_modules="all-linear"))
    assert all("second" in layer.dvora_adapted for layer in layers_in(model))
