"""PEFT models in evaluation: after every operation their outputs are those of a newly made model."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import dvora
from dvora import DVoRAConfig
from tests.tuner.tiny import MODELS, dvora_layers, forward, loss, outputs, same_bits, train_vectors
from tests.weight.evaluated_cases import CHANGES, Evaluated, in_peft

LAYERS = ["lin0", "lin1", "lin2"]
Operation = Callable[[PeftModel], object]


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_follows_a_change(change: str) -> None:
    case = in_peft()
    before = case.outputs()
    CHANGES[change](case)
    found = case.outputs()
    assert not torch.equal(found, before)
    assert torch.equal(found, case.fresh().outputs())


def test_factors_are_made_once_in_evaluation_and_never_in_training() -> None:
    case = in_peft()
    case.outputs()
    kept = case.factors()
    assert kept is not None
    case.outputs()
    assert case.factors() is kept
    case.model(case.x()).sum().backward()
    assert case.factors() is None


def settings(**changed: object) -> DVoRAConfig:
    return DVoRAConfig(**{"r": 4, "target_modules": LAYERS, **changed})


def adapted(seed: int = 0, **changed: object) -> PeftModel:
    """The tiny MLP with two adapters as if trained, the first one active."""
    model = get_peft_model(MODELS["mlp"](), settings(**changed)).eval()
    model.add_adapter("second", settings(**changed))
    for index, name in enumerate(("default", "second")):
        train_vectors(model, name, seed + index)
    return model


def anew(model: PeftModel) -> PeftModel:
    """A copy in which everything that is kept was dropped and measured again."""
    made = copy.deepcopy(model)
    for _, layer in dvora_layers(made):
        for name in layer.dvora_adapted:
            layer.adapted(name).refresh(layer.unmerged())
    return made


def saved(tmp_path: Path, seed: int = 7) -> Path:
    """The folder of another adapter for the same layers."""
    model = get_peft_model(MODELS["mlp"](), settings(strength=0.7))
    train_vectors(model, seed=seed)
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def write_strength(model: PeftModel) -> None:
    for _, layer in dvora_layers(model):
        layer.strength("default").fill_(0.4)


def merge_and_unmerge(model: PeftModel) -> None:
    model.merge_adapter()
    outputs(model)
    model.unmerge_adapter()
    train_vectors(model, seed=3)


def merge_the_second(model: PeftModel) -> None:
    model.merge_adapter(["second"])
    outputs(model)
    model.unmerge_adapter()
    model.set_adapter("second")


def use_a_weighted_adapter(model: PeftModel) -> None:
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("second").lambda_d.copy_(layer.vectors("default").lambda_d)
    model.add_weighted_adapter(["default", "second"], [0.4, 0.9], "third", combination_type="linear")
    model.set_adapter("third")


def use_an_interpolated_adapter(model: PeftModel) -> None:
    model.base_model.interpolate_adapters("default", "second", 0.3, "third")
    model.set_adapter("third")


def switch_there_and_back(model: PeftModel) -> None:
    model.set_adapter("second")
    outputs(model)
    train_vectors(model, "default", seed=5)
    model.set_adapter("default")


def replace_an_adapter(model: PeftModel) -> None:
    model.set_adapter("second")
    model.delete_adapter("default")
    outputs(model)
    model.add_adapter("default", settings(direction="weight"))
    train_vectors(model, "default", seed=6)
    model.set_adapter("default")


def train_the_second(model: PeftModel) -> None:
    model.set_adapter("second")
    model.train()
    loss(model).backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.eval()


@torch.no_grad()
def write_a_base(model: PeftModel) -> None:
    next(layer for _, layer in dvora_layers(model)).base_layer.weight.mul_(1.5)


def load_everything(model: PeftModel) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


OPERATIONS: dict[str, Operation] = {
    "set_strength": lambda model: model.set_strength(0.3),
    "set_strength of one layer": lambda model: model.set_strength({"lin1": -0.5}),
    "set_adapter": lambda model: model.set_adapter("second"),
    "set_adapter of both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "double": lambda model: model.double(),
    **{f.__name__: f for f in (write_strength, write_a_base, load_everything, train_the_second)},
    **{f.__name__: f for f in (merge_and_unmerge, merge_the_second, switch_there_and_back, replace_an_adapter)},
    **{f.__name__: f for f in (use_a_weighted_adapter, use_an_interpolated_adapter)},
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_evaluation_follows_an_operation(operation: str) -> None:
    model = adapted()
    before = outputs(model)
    outputs(model)
    OPERATIONS[operation](model)
    found = outputs(model)
    assert not same_bits(found, before)
    assert same_bits(found, outputs(anew(model)))


def test_evaluation_follows_a_hotswap(tmp_path: Path) -> None:
    model = adapted()
    folder = saved(tmp_path)
    before = outputs(model)
    dvora.hotswap_adapter(model, folder)
    found = outputs(model)
    assert not same_bits(found, before)
    assert same_bits(found, outputs(PeftModel.from_pretrained(MODELS["mlp"](), folder).eval()))


def test_evaluation_follows_a_loaded_adapter(tmp_path: Path) -> None:
    model = adapted()
    folder = saved(tmp_path)
    before = outputs(model)
    model.load_adapter(str(folder), "third")
    model.set_adapter("third")
    found = outputs(model.eval())
    assert not same_bits(found, before)
    assert same_bits(found, outputs(PeftModel.from_pretrained(MODELS["mlp"](), folder).eval()))


def test_evaluation_follows_values_that_are_loaded_over_an_adapter(tmp_path: Path) -> None:
    model = adapted()
    folder = saved(tmp_path)
    before = outputs(model)
    model.load_adapter(str(folder), "default")
    found = outputs(model.eval())
    assert not same_bits(found, before)
    model.set_strength(0.7)
    assert same_bits(outputs(model), outputs(PeftModel.from_pretrained(MODELS["mlp"](), folder).eval()))


def test_rows_with_adapters_of_their_own_use_and_follow_what_each_adapter_keeps() -> None:
    model = adapted()
    names = ["second", "default", "__base__", "second"]
    outputs(model, adapter_names=names)
    layers = [layer for _, layer in dvora_layers(model)]
    kept = [layer.adapted(name)._last._kept[1] for layer in layers for name in ("default", "second")]
    outputs(model, adapter_names=names)
    again = [layer.adapted(name)._last._kept[1] for layer in layers for name in ("default", "second")]
    assert all(first is second for first, second in zip(kept, again, strict=True))
    train_vectors(model, "second", seed=4)
    assert same_bits(outputs(model, adapter_names=names), outputs(anew(model), adapter_names=names))


def test_a_merged_model_follows_what_was_kept_before_it() -> None:
    model = adapted()
    before = outputs(model)
    model.merge_adapter()
    assert torch.allclose(outputs(model), before, atol=1e-5)
    model.unmerge_adapter()
    assert same_bits(outputs(model), before)


def test_frozen_adapters_pass_gradients_to_their_inputs_from_what_is_kept() -> None:
    model = adapted(inference_mode=True)
    with torch.inference_mode():
        forward(model)
    kept = [layer.adapted("default")._last._kept[1] for _, layer in dvora_layers(model)]
    x = torch.ones(2, 10, requires_grad=True)
    model(x).square().sum().backward()
    assert [layer.adapted("default")._last._kept[1] for _, layer in dvora_layers(model)] == kept
    fresh_x = torch.ones(2, 10, requires_grad=True)
    anew(model)(fresh_x).square().sum().backward()
    assert torch.equal(x.grad, fresh_x.grad)


def test_a_copy_that_is_trained_leaves_the_model_alone() -> None:
    case = in_peft()
    before = case.outputs()
    other = Evaluated(copy.deepcopy(case.model))
    CHANGES["train"](other)
    assert torch.equal(case.outputs(), before)
    assert torch.equal(other.outputs(), other.fresh().outputs())
