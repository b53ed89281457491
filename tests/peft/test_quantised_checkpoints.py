"""A real model, quantised by transformers while it loads: adapt, train, save, load."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dvora import DVoRAConfig
from materials import models
from materials.fetch import cache_folder
from tests.peft.bases import BASES
from tests.peft.tiny import dvora_layers, same_bits

IDS = torch.arange(1000, 1008).view(1, 8)
TARGETS = [f"layers.{layer}.self_attn.{name}" for layer in range(0, 6, 2) for name in ("q_proj", "v_proj")]


def smollm2() -> nn.Module:
    """Its first layers, in nf4."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not (cache_folder() / models.SMOLLM2_FOLDER).is_dir():
        pytest.skip("SmolLM2 is not in the cache; materials.models.smollm2() would make it")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(
        models.smollm2(), quantization_config=nf4, dtype=torch.float32, device_map="cpu", num_hidden_layers=6
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def trained(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_quantised_checkpoint_is_adapted_trained_saved_and_loaded(tmp_path: Path) -> None:
    base = smollm2()
    layers = {name: layer for name, layer in base.named_modules() if name.endswith(tuple(TARGETS))}
    norms = {name: BASES["bnb_nf4"].weight(layer).float().norm(dim=1) for name, layer in layers.items()}
    expected = logits(base.train())
    model = get_peft_model(base, DVoRAConfig(r=64, target_modules=TARGETS)).train()
    assert same_bits(logits(model), expected)
    for name, layer in dvora_layers(model):
        assert torch.allclose(layer.vectors("default").magnitude, norms.pop(name), rtol=1e-5, atol=0.0)
    assert not norms
    # One evaluation between the steps, as in every training run.
    losses = trained(model, 1)
    logits(model.eval())
    losses += trained(model.train(), 3)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(smollm2(), tmp_path)
    for mode in (True, False):
        assert same_bits(logits(loaded.train(mode)), logits(model.train(mode)))
