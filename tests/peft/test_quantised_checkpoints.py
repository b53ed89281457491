"""Real models, quantised by transformers while they load: adapt, train, save, load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from dvora import DVoRAConfig
from materials import models
from materials.fetch import cache_folder
from tests.peft.bases import BASES, GROUP
from tests.peft.tiny import dvora_layers, same_bits

IDS = torch.arange(1000, 1008).view(1, 8)


def smollm2() -> nn.Module:
    """Its first layers."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if not (cache_folder() / models.SMOLLM2_FOLDER).is_dir():
        pytest.skip("SmolLM2 is not in the cache; materials.models.smollm2() would make it")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(
        models.smollm2(), quantization_config=nf4, dtype=torch.float32, device_map="cpu", num_hidden_layers=6
    )


def minilm() -> nn.Module:
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    four_bits = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModel.from_pretrained(
        models.minilm(),
        quantization_config=TorchAoConfig(quant_type=four_bits),
        dtype=torch.float32,
        device_map="cpu",
        **no_dropout,
    )


def language_loss(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def distance_to_a_target(model: nn.Module) -> Tensor:
    return (result(model) - torch.randn(384, generator=torch.Generator().manual_seed(2))).square().mean()


CHECKPOINTS = {
    "SmolLM2 in nf4": (
        smollm2,
        "bnb_nf4",
        [f"layers.{layer}.self_attn.{name}" for layer in range(0, 6, 2) for name in ("q_proj", "v_proj")],
        language_loss,
    ),
    "MiniLM in int4": (minilm, "torchao_int4", ["query", "value", "output.dense"], distance_to_a_target),
}


def result(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


def train(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


@pytest.mark.parametrize(("load", "kind", "targets", "loss"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_quantised_checkpoint_is_adapted_trained_saved_and_loaded(
    load: Callable[[], nn.Module], kind: str, targets: list[str], loss: Callable[[nn.Module], Tensor], tmp_path: Path
) -> None:
    base = load()
    layers = {name: layer for name, layer in base.named_modules() if name.endswith(tuple(targets))}
    weights = {name: BASES[kind].weight(layer).float() for name, layer in layers.items()}
    with torch.no_grad():
        expected = result(base.train())
    model = get_peft_model(base, DVoRAConfig(r=64, target_modules=targets)).train()
    with torch.no_grad():
        assert same_bits(result(model), expected)
    for name, layer in dvora_layers(model):
        norms = weights.pop(name).norm(dim=1)
        assert torch.allclose(layer.vectors("default").magnitude, norms, rtol=1e-5, atol=0.0)
    assert not weights
    # One evaluation between the steps, as in every training run.
    losses = train(model, loss, 1)
    with torch.no_grad():
        result(model.eval())
    losses += train(model.train(), loss, 3)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(), tmp_path)
    with torch.no_grad():
        for mode in (True, False):
            assert same_bits(result(loaded.train(mode)), result(model.train(mode)))
