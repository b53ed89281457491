"""A model that transformers quantises while it loads: adapt, train, save, load."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dvora import DVoRAConfig
from tests.engines.training import train
from tests.peft.bases import BASES
from tests.peft.tiny import LAYERS, dvora_layers, llama, outputs, same_bits


def quantised(folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32, device_map="cpu")


def test_a_quantised_checkpoint_is_adapted_trained_saved_and_loaded(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = quantised(tmp_path / "base").train()
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
    loaded = PeftModel.from_pretrained(quantised(tmp_path / "base"), tmp_path / "adapter")
    for mode in (True, False):
        assert same_bits(outputs(loaded.train(mode)), outputs(model.train(mode)))
