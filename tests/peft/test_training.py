"""Training adapted models: optimizers, biases, heads, the count of what is trained."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dvora import DVoRAConfig
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, forward, inputs, outputs, same_bits, train_vectors


def adapted(name: str, **options: object) -> PeftModel:
    return get_peft_model(MODELS[name](), DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options}))


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(model: PeftModel, steps: int = 8) -> list[float]:
    """Losses of a few AdamW steps towards fixed targets."""
    target = torch.randn(forward(model).shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (forward(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_adamw_lowers_the_loss_and_moves_the_vectors_only(name: str) -> None:
    model = adapted(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not same_bits(p, before[n])}
    assert moved == trainable(model) == {n for n in before if ".dvora_" in n}


def test_a_loaded_adapter_trains_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    model = adapted("bert", save_projection=True)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["bert"](), tmp_path, is_trainable=True)
    assert same_bits(outputs(loaded), outputs(model.eval()))
    assert train(loaded, steps=3) == train(model, steps=3)


@pytest.mark.parametrize("name", MODELS)
def test_the_count_of_trainable_parameters_is_two_outputs_and_a_rank_a_layer(name: str) -> None:
    model = adapted(name)
    expected = sum(2 * layer.out_features + 6 for _, layer in dvora_layers(model))
    total = sum(p.numel() for p in MODELS[name]().parameters()) + expected
    assert model.get_nb_trainable_parameters() == (expected, total)


@pytest.mark.parametrize(("bias", "theirs"), [("none", "none"), ("all", "all"), ("dvora_only", "lora_only")])
def test_the_biases_that_train_are_those_of_lora(bias: str, theirs: str) -> None:
    ours = trainable(adapted("bert", bias=bias))
    lora = LoraConfig(target_modules=LAYERS["bert"], bias=theirs)
    expected = {n for n in trainable(get_peft_model(MODELS["bert"](), lora)) if n.endswith(".bias")}
    assert {n for n in ours if n.endswith(".bias")} == expected
    assert bool(expected) == (bias != "none")


def test_a_trained_bias_is_not_rescaled_and_gets_its_gradient() -> None:
    model = adapted("mlp", bias="dvora_only")
    train_vectors(model)
    x = inputs(model)["x"]
    layer = model.get_submodule("base_model.model.lin0")
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(layer.base_layer.bias.grad, torch.full_like(layer.base_layer.bias, len(x)), rtol=1e-5)
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
        assert torch.allclose(layer(x) - y, torch.ones_like(y), atol=1e-5)
