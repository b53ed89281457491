"""Real models, quantised by transformers while they load: adapt, train, save, load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_compared import worst_difference
from peft import PeftModel, get_peft_model
from tiny import dvora_layers, same_bits
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import models
from benchmarks.fetch import cache_folder
from dvora import DVoRAConfig

IDS = torch.arange(1000, 1024).view(2, 12)


def smollm2() -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not (cache_folder() / models.SMOLLM2_FOLDER).is_dir():
        pytest.skip("SmolLM2 is not in the cache; benchmarks.models.smollm2() would make it")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(
        models.smollm2(), quantization_config=nf4, dtype=torch.float32, device_map="cpu"
    )


def minilm() -> nn.Module:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    int8 = BitsAndBytesConfig(load_in_8bit=True)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModel.from_pretrained(
        models.minilm(), quantization_config=int8, dtype=torch.float32, device_map="cpu", **no_dropout
    )


CHECKPOINTS = {
    "SmolLM2 in nf4": (smollm2, ["q_proj", "v_proj"], 60, "Linear4bit"),
    "MiniLM in 8 bits": (minilm, ["query", "value", "output.dense"], 24, "Linear8bitLt"),
}


def result(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


def train(model: nn.Module, steps: int) -> list[float]:
    """Losses on the way to the model's own outputs, moved by a fifth of their size."""
    with torch.no_grad():
        start = result(model)
        noise = torch.randn(start.shape[-1], generator=torch.Generator().manual_seed(2))
        target = start + 0.2 * start.std() * noise
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (result(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("load", "targets", "count", "layer_type"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_quantised_checkpoint_is_adapted_trained_saved_and_loaded(
    load: Callable[[], nn.Module], targets: list[str], count: int, layer_type: str, tmp_path: Path
) -> None:
    base = load()
    with torch.no_grad():
        expected = result(base.train())
    model = get_peft_model(base, DVoRAConfig(r=64, target_modules=targets)).train()
    with torch.no_grad():
        assert same_bits(result(model), expected)
    layers = [layer for _, layer in dvora_layers(model)]
    assert len(layers) == count
    assert {type(layer.base_layer).__name__ for layer in layers} == {layer_type}
    # One evaluation between the steps, as in every training run.
    losses = train(model, 2)
    with torch.no_grad():
        result(model.eval())
    losses += train(model.train(), 2)
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    with torch.no_grad():
        # Saving has run nothing, but the trained model has been evaluated and the loaded one has not.
        assert worst_difference(result(loaded.train()), result(model.train())) < 1e-5
        assert worst_difference(result(loaded.eval()), result(model.eval())) < 0.05
