"""What trains: trainable parameters, biases, heads, gradient checkpointing, AdamW steps, alternating adapters."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from dvora import DVoRAConfig
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, forward, gradients, inputs, outputs, same_bits, train_vectors


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


def vectors(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(f".{adapter}")}


@pytest.mark.parametrize("name", MODELS)
def test_adamw_lowers_the_loss_and_moves_the_vectors_only(name: str) -> None:
    model = adapted(name)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = vectors(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(not same_bits(value, before[n]) for n, value in vectors(model).items())
    assert all(same_bits(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_trained_adapter_is_the_same_after_saving_and_loading(name: str, tmp_path: Path) -> None:
    model = adapted(name, save_projection=True)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path, is_trainable=True)
    assert same_bits(outputs(loaded), outputs(model.eval()))
    assert train(loaded, steps=3) == train(model, steps=3)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_inactive_adapter_does_not_change_while_another_trains(name: str) -> None:
    model = adapted(name)
    model.add_adapter("second", DVoRAConfig(r=9, target_modules=LAYERS[name], projection_seed=1))
    for active, idle in [("default", "second"), ("second", "default"), ("default", "second")]:
        model.set_adapter(active)
        untouched, moving = vectors(model, idle), vectors(model, active)
        train(model, steps=2)
        assert all(same_bits(v, untouched[n]) for n, v in vectors(model, idle).items())
        assert any(not same_bits(v, moving[n]) for n, v in vectors(model, active).items())


# transformers 5 has a new name for it, which the older versions that dvora allows do not know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, use_reentrant: bool) -> None:
    model = adapted(name)
    train_vectors(model)
    expected = gradients(model)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # A reentrant checkpoint passes no gradient on unless an input asks for one.
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls: list[torch.nn.Module] = []
    layer = next(layer for _, layer in dvora_layers(model))
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    checkpointed = gradients(model)
    assert len(calls) == 2
    assert checkpointed.keys() == expected.keys()
    assert max(worst_difference(checkpointed[key], expected[key]) for key in expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_count_of_trainable_parameters_is_two_outputs_and_a_rank_a_layer(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = adapted(name)
    expected = sum(2 * layer.out_features + 6 for _, layer in dvora_layers(model))
    total = sum(p.numel() for p in MODELS[name]().parameters()) + expected
    assert model.get_nb_trainable_parameters() == (expected, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {expected:,} || all params: {total:,}")


def test_a_thousand_by_a_thousand_layer_at_rank_8_has_2008_trainable_parameters() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1000, 1000)), DVoRAConfig(r=8, target_modules=["0"]))
    assert model.get_nb_trainable_parameters()[0] == 2008


@pytest.mark.parametrize(("bias", "theirs"), [("none", "none"), ("all", "all"), ("dvora_only", "lora_only")])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_biases_that_train_are_those_of_lora(name: str, bias: str, theirs: str) -> None:
    ours = trainable(adapted(name, bias=bias))
    lora = LoraConfig(target_modules=LAYERS[name], bias=theirs, fan_in_fan_out=name == "gpt2")
    expected = {n for n in trainable(get_peft_model(MODELS[name](), lora)) if n.endswith(".bias")}
    assert {n for n in ours if n.endswith(".bias")} == expected
    assert bool(expected) == (bias != "none")


@pytest.mark.parametrize("bias", ["all", "dvora_only"])
def test_a_trained_bias_is_not_rescaled_and_gets_its_gradient(bias: str) -> None:
    model = adapted("mlp", bias=bias)
    train_vectors(model)
    x = inputs(model)["x"]
    layer = model.get_submodule("base_model.model.lin0")
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(layer.base_layer.bias.grad, torch.full_like(layer.base_layer.bias, len(x)), rtol=1e-5)
    with torch.no_grad():
        layer.base_layer.bias.add_(1.0)
        assert torch.allclose(layer(x) - y, torch.ones_like(y), atol=1e-5)


def test_two_adapters_with_biases_are_refused_as_with_lora() -> None:
    model = adapted("mlp", bias="all")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", DVoRAConfig(r=3, target_modules=["lin0"], bias="dvora_only"))
    assert list(model.peft_config) == ["default"]


def test_disabling_an_adapter_with_biases_warns_as_with_lora() -> None:
    with pytest.warns(UserWarning, match="bias configured to be 'all'"), adapted("mlp", bias="all").disable_adapter():
        pass


def test_modules_to_save_train_beside_the_vectors_and_the_base_is_kept() -> None:
    model = adapted("bert", modules_to_save=["classifier"])
    head = {n for n in trainable(model) if ".dvora_" not in n}
    assert head == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}
    train(model)
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(MODELS["bert"]()))


def test_a_task_type_saves_its_head_as_with_lora() -> None:
    ours = adapted("bert", task_type="SEQ_CLS")
    lora = get_peft_model(MODELS["bert"](), LoraConfig(target_modules=LAYERS["bert"], task_type="SEQ_CLS"))
    assert type(ours) is type(lora)
    assert {n for n in trainable(ours) if ".dvora_" not in n} == {n for n in trainable(lora) if ".lora_" not in n}


def test_each_adapter_has_its_own_head() -> None:
    model = adapted("bert", modules_to_save=["classifier"])
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    model.set_adapter("second")
    train(model)
    model.set_adapter("default")
    assert same_bits(outputs(model.eval()), outputs(MODELS["bert"]()))


def test_inference_mode_trains_nothing() -> None:
    assert not trainable(adapted("mlp", inference_mode=True))


def test_training_goes_on_after_a_merge_and_an_unmerge() -> None:
    model = adapted("mlp")
    train(model, steps=2)
    model.merge_adapter()
    model.unmerge_adapter()
    losses = train(model)
    assert losses[-1] < losses[0]
