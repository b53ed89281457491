"""Several adapters in one model: added in any order, switched, summed, disabled, deleted, unloaded."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from dvora import DVoRAConfig
from tests.peft.dense import dense_model
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

CONFIGS = {
    "default": {"r": 6},
    "wide": {"r": 40, "projection_seed": 3, "direction": "weight", "alpha": 20},
    "structured": {"r": 2, "projection_init": "structured"},
    "same seed": {"r": 11},
}
"""Adapters of different ranks, seeds, distributions and directions."""


def config(name: str, adapter: str) -> DVoRAConfig:
    return DVoRAConfig(target_modules=LAYERS[name], **CONFIGS[adapter])


def with_adapters(
    name: str, adapters: tuple[str, ...] = tuple(CONFIGS), dtype: torch.dtype = torch.float32
) -> PeftModel:
    """A model with trained adapters, added in this order; the first is active. Vectors depend on the name only."""
    model = get_peft_model(MODELS[name]().to(dtype), config(name, adapters[0]), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config(name, adapter))
    for seed, adapter in enumerate(CONFIGS):
        train_vectors(model, adapter, seed)
    return model.eval()


@pytest.mark.parametrize("order", list(itertools.permutations(["default", "wide", "structured"])), ids="-".join)
def test_the_order_of_adding_adapters_changes_no_bit_of_their_outputs(order: tuple[str, ...]) -> None:
    model = with_adapters("bert", order)
    for adapter in order:
        alone = with_adapters("bert", (adapter,))
        model.set_adapter(adapter)
        assert same_bits(outputs(model), outputs(alone))


@pytest.mark.parametrize("name", MODELS)
def test_adding_an_adapter_leaves_the_active_one_active_and_its_outputs_unchanged(name: str) -> None:
    model = with_adapters(name, ("default",))
    before = outputs(model)
    model.add_adapter("wide", config(name, "wide"))
    assert model.active_adapters == ["default"]
    assert same_bits(outputs(model), before)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("mlp", torch.float64, 1e-12),
        ("gpt2", torch.float64, 1e-12),
        ("bert", torch.float32, 1e-5),
    ],
)
def test_active_adapters_add_up(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model = with_adapters(name, dtype=dtype)
    names = ["default", "wide", "structured"]
    model.base_model.set_adapter(names)
    assert worst_difference(outputs(model), outputs(dense_model(model, names))) < tolerance


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_active_adapters_merged_equal_them_unmerged(name: str) -> None:
    model = with_adapters(name, dtype=torch.float64)
    model.base_model.set_adapter(["default", "wide", "same seed"])
    before = outputs(model)
    model.merge_adapter()
    assert worst_difference(outputs(model), before) < 1e-12


def test_a_layer_adapts_by_the_active_adapters_it_has() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"]), adapter_name="first")
    model.add_adapter("second", DVoRAConfig(r=5, target_modules=["lin1", "lin2"]))
    for adapter in ("first", "second"):
        train_vectors(model, adapter)
    model.base_model.set_adapter(["first", "second"])
    assert worst_difference(outputs(model), outputs(dense_model(model, ["first", "second"]))) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_disable_adapter_returns_the_bits_of_the_base(name: str) -> None:
    model = with_adapters(name)
    adapted = outputs(model)
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(MODELS[name]()))
    assert same_bits(outputs(model), adapted)


def test_disable_adapter_unmerges_as_lora_does() -> None:
    model = with_adapters("mlp")
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(outputs(model), outputs(MODELS["mlp"]()))


@pytest.mark.parametrize("name", MODELS)
def test_unload_returns_the_base_as_it_was(name: str) -> None:
    base = MODELS[name]()
    before = snapshot(base)
    model = with_adapters(name)
    unloaded = model.unload()
    assert type(unloaded) is type(base)
    assert_unchanged(unloaded, before, trainable=False)
    assert same_bits(outputs(unloaded), outputs(base))


def test_unload_of_a_merged_model_keeps_the_merged_weights_as_lora_does() -> None:
    model = with_adapters("mlp")
    expected = outputs(model)
    model.merge_adapter()
    assert worst_difference(outputs(model.unload()), expected) < 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_deleted_adapter_is_gone_and_the_others_are_not_changed(name: str) -> None:
    model, without = with_adapters(name), with_adapters(name, ("default", "structured", "same seed"))
    model.delete_adapter("wide")
    assert "wide" not in model.peft_config
    assert not [key for key in model.state_dict() if ".wide" in key]
    for adapter in without.peft_config:
        model.set_adapter(adapter)
        without.set_adapter(adapter)
        assert same_bits(outputs(model), outputs(without))


def test_deleting_the_active_adapter_activates_another_with_a_warning_as_with_lora() -> None:
    model = with_adapters("mlp", ("default", "wide"))
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert model.active_adapters == ["wide"]
    assert same_bits(outputs(model), outputs(with_adapters("mlp", ("wide",))))


def test_without_any_adapter_left_the_model_is_its_base() -> None:
    model = with_adapters("mlp", ("default",))
    model.delete_adapter("default")
    # PEFT's own wrapper wants an active adapter for a forward pass; the model inside does not.
    assert same_bits(outputs(model.base_model), outputs(MODELS["mlp"]()))


def test_a_deleted_name_can_be_used_again() -> None:
    model = with_adapters("mlp", ("default", "wide"))
    model.delete_adapter("wide")
    model.add_adapter("wide", DVoRAConfig(r=3, target_modules=["lin1"]))
    model.set_adapter("wide")
    assert same_bits(outputs(model), outputs(MODELS["mlp"]()))


def test_a_name_that_is_taken_is_refused() -> None:
    model = with_adapters("mlp", ("default",))
    before = snapshot(model)
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", config("mlp", "wide"))
    assert_unchanged(model, before)


def test_an_adapter_of_another_method_is_refused() -> None:
    model = with_adapters("mlp", ("default",))
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["lin0"]))
    assert_unchanged(model, before)


def test_set_adapter_trains_the_active_adapter_only() -> None:
    model = with_adapters("mlp", ("default", "wide"))
    model.set_adapter("wide")
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"wide"}
    model.set_adapter("default", inference_mode=True)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_an_injected_adapter_is_the_same_as_in_a_peft_model(name: str) -> None:
    model = with_adapters(name, ("default",))
    vectors = get_peft_model_state_dict(model)
    bare = inject_adapter_in_model(config(name, "default"), MODELS[name]())
    assert type(bare) is type(MODELS[name]())
    result = set_peft_model_state_dict(bare, vectors)
    assert not result.unexpected_keys
    assert same_bits(outputs(bare), outputs(model))
    again = get_peft_model_state_dict(bare)
    assert {f"base_model.model.{k}" for k in again} == vectors.keys()


def test_an_adapter_can_be_injected_by_the_names_in_its_state_dict() -> None:
    model = with_adapters("bert", ("default",))
    vectors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    bare = inject_adapter_in_model(config("bert", "default"), MODELS["bert"](), state_dict=vectors)
    set_peft_model_state_dict(bare, vectors)
    assert same_bits(outputs(bare), outputs(model))


def test_layer_and_model_status_are_those_of_lora() -> None:
    ours = with_adapters("bert", ("default",)).get_model_status()
    theirs = get_peft_model(MODELS["bert"](), LoraConfig(target_modules=LAYERS["bert"])).get_model_status()
    for field in (
        "num_adapter_layers",
        "enabled",
        "active_adapters",
        "merged_adapters",
        "requires_grad",
        "available_adapters",
        "devices",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.peft_types == {"default": "DVORA"}


def test_layer_types_are_shown_by_the_method_name() -> None:
    model = with_adapters("mlp", ("default",))
    assert {status.module_type for status in model.get_layer_status()} == {"dvora.DVoRALinear"}
    assert all(repr(layer).startswith("dvora.") for _, layer in dvora_layers(model))


def test_a_merged_adapter_is_not_deleted_as_with_lora() -> None:
    model = with_adapters("mlp", ("default", "wide"))
    model.merge_adapter(["wide"])
    with pytest.raises(ValueError, match=r"\['wide'\] while they are merged"):
        model.delete_adapter("wide")
    model.unmerge_adapter()
    model.delete_adapter("wide")


def test_mixing_with_other_methods_is_refused() -> None:
    base = MODELS["mlp"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match="'DVORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base, config("mlp", "default"), mixed=True)
    assert_unchanged(base, before)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_that_is_added_takes_the_mode_of_its_layers(training: bool) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"])).train(training)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0", "lin1"], dvora_dropout=0.5))
    train_vectors(model, "second")
    model.set_adapter("second")
    assert {module.training for module in model.base_model.model.modules()} == {training}
    assert same_bits(outputs(model), outputs(model)) is not training
