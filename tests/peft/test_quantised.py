"""Adapters on quantised layers, beside what the table of what works tries on each (`test_support.py`)."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dvora import DVoRAConfig
from tests.engines.training import train
from tests.peft.bases import BASES, FAMILIES, QUANTISED, TRAINABLE, Base, dense_twin, operating_weight, quantised, wide
from tests.peft.dense_weights import gradients_by_parameter
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, dvora_layers, llama, outputs, same_bits, train_vectors

TARGETS = ["lin0", "lin1", "lin2"]


def inputs(base: Base, rows: int = 5) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(base.dtype)


def trained(kind: str, **options: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 8, "target_modules": TARGETS, **options})
    model = get_peft_model(quantised(wide(), kind), config).train()
    train_vectors(model)
    return model


@torch.no_grad()
def output(model: nn.Module, kind: str) -> Tensor:
    return model(inputs(BASES[kind]))


def norm_error(base: nn.Module, plain: nn.Module, kind: str) -> float:
    """Largest relative error of a fresh magnitude, which is the norm of the weight's row."""
    model, errors = get_peft_model(base, DVoRAConfig(r=8, target_modules=TARGETS)), []
    for name, layer in dvora_layers(model):
        norms = operating_weight(plain.get_submodule(name), kind).norm(dim=1)
        errors.append(float((layer.vectors("default").magnitude.detach() / norms - 1).abs().max()))
    return max(errors)


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_weight_that_an_adapter_reads_is_the_one_that_the_base_multiplies_by(kind: str) -> None:
    assert norm_error(quantised(wide(), kind), wide(), kind) < BASES[kind].norm_tolerance
    weight = wide().lin0.weight.double()
    rounding = float((operating_weight(wide().lin0, kind) - weight).norm() / weight.norm())
    assert 1e-4 < rounding < 0.15  # or the test would show nothing


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("direction", ["unit", "weight"])
@pytest.mark.parametrize("kind", TRAINABLE)
def test_outputs_and_gradients_in_training_are_those_of_the_dense_reference(
    kind: str, direction: str, groups: int
) -> None:
    model = trained(kind, direction=direction, alpha=12.0, lambda_d_groups=groups)
    dense, tolerance = dense_twin(model, wide(), kind), 3 * BASES[kind].tolerance
    outputs, expected = model(inputs(BASES[kind])), dense(inputs(BASES[kind]))
    assert worst_difference(outputs, expected) < tolerance
    weights = torch.linspace(-1, 2, expected.numel()).view_as(expected)
    (outputs * weights.to(outputs.dtype)).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, gradient in gradients_by_parameter(model).items():
        assert worst_difference(gradient, dense.gradients()[name]) < 2 * tolerance, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_another_quantised_base_is_refused_and_stays_as_it_was(kind: str, tmp_path: Path) -> None:
    trained(kind).save_pretrained(tmp_path)
    other = quantised(wide(seed=1), kind).train()
    before = output(other, kind)
    with pytest.raises(ValueError, match=r"lin0: .*another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert same_bits(output(other, kind), before)
    assert not list(dvora_layers(other))


@pytest.mark.parametrize("kind", FAMILIES)
def test_unloading_gives_the_quantised_model_back(kind: str) -> None:
    model, plain = trained(kind).unload().train(), quantised(wide(), kind).train()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert same_bits(output(model, kind), output(plain, kind))


@pytest.mark.parametrize("kind", ["torchao_int8", "hqq_4bit", "forward_only"])
def test_constants_follow_a_quantised_weight_that_is_loaded(kind: str) -> None:
    model = trained(kind)
    other = get_peft_model(quantised(wide(seed=1), kind), DVoRAConfig(r=8, target_modules=TARGETS))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert same_bits(output(other.train(), kind), output(model, kind))


# bitsandbytes rewrites a 4-bit weight in its first eval pass on some CPUs. After that its own dequantisation returns
# garbage, and the layer has no backward any more; on other CPUs these tests check the same outputs and gradients.

REWRITTEN = ["bnb_nf4", "bnb_fp4", "bnb_nf4_bfloat16"]
ROUNDED_AGAIN = 8e-3
"""Rewriting rounds the scales of a weight to bfloat16, and what is read back has been quantised once more."""


def evaluated(model: nn.Module, kind: str) -> nn.Module:
    model.eval()
    for _ in range(2):
        output(model, kind)
    return model


def gradients(model: nn.Module, kind: str) -> dict[str, Tensor]:
    x = inputs(BASES[kind]).requires_grad_()
    model.zero_grad()
    (model(x) * torch.linspace(-1, 2, 5 * 32).to(x.dtype).view(5, 32)).sum().backward()
    return {"x": x.grad, **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", REWRITTEN)
def test_constants_are_right_on_a_base_that_ran_before(kind: str) -> None:
    assert norm_error(evaluated(quantised(wide(), kind), kind), wide(), kind) < ROUNDED_AGAIN


# With a target only, gradients pass through layers that are not adapted, too.
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1]], ids=["all layers", "the first"])
@pytest.mark.parametrize("kind", REWRITTEN)
def test_eval_passes_change_neither_outputs_nor_gradients_of_training(kind: str, targets: list[str]) -> None:
    model = trained(kind, target_modules=targets)
    expected, expected_gradients = output(model, kind), gradients(model, kind)
    evaluated(model, kind).train()
    assert same_bits(output(model, kind), expected)
    again = gradients(model, kind)
    assert again.keys() == expected_gradients.keys()
    assert all(same_bits(value, expected_gradients[name]) for name, value in again.items())


# Quantised by transformers while it loads.


def read_in_nf4(folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32, device_map="cpu")


def test_a_quantised_checkpoint_is_adapted_trained_saved_and_loaded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = read_in_nf4(tmp_path / "base").train()
    layers = {name: layer for name, layer in base.named_modules() if name.endswith(tuple(LAYERS["llama"]))}
    norms = {name: BASES["bnb_nf4"].weight(layer).float().norm(dim=1) for name, layer in layers.items()}
    expected = outputs(base)
    model = get_peft_model(base, DVoRAConfig(r=6, target_modules=LAYERS["llama"])).train()
    assert same_bits(outputs(model), expected)
    for name, layer in dvora_layers(model):
        assert torch.allclose(layer.vectors("default").magnitude, norms.pop(name), rtol=1e-5, atol=0.0)
    assert not norms
    before = train(model)
    # An evaluation between the steps, as in every training run.
    outputs(model.eval())
    assert sum(train(model.train())) < sum(before)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(read_in_nf4(tmp_path / "base"), tmp_path / "adapter")
    for mode in (True, False):
        assert same_bits(outputs(loaded.train(mode)), outputs(model.train(mode)))
