"""Merging into the base's weights, of all layers or of none, and taking it back bit for bit."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig, MergePrecisionWarning
from dvora.peft.merging import merge_model
from tests.peft.bases import PackedLinear
from tests.peft.dense_weights import DenseModel
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, inputs, outputs, same_bits, train_vectors

ADAPTERS = ["default", "second", "third"]
# PEFT says so at every merge that follows another, here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")


def adapted(name: str = "mlp", dtype: torch.dtype = torch.float32, adapters: int = 3) -> PeftModel:
    """A model with trained adapters of several ranks, seeds and groups, the first active."""
    model = get_peft_model(MODELS[name]().to(dtype), DVoRAConfig(r=6, target_modules=LAYERS[name]))
    for seed, adapter in enumerate(ADAPTERS[1:adapters], start=1):
        settings = {"r": 3 * seed, "projection_seed": seed, "lambda_d_groups": (1, 4)[seed % 2]}
        model.add_adapter(adapter, DVoRAConfig(target_modules=LAYERS[name], **settings))
    for seed, adapter in enumerate(ADAPTERS[:adapters]):
        train_vectors(model, adapter, seed)
    return model.eval()


def merged_adapters(model: nn.Module) -> set[tuple[str, ...]]:
    return {tuple(layer.merged_adapters) for _, layer in dvora_layers(model)}


# What a merge computes.


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_returns_a_plain_base_with_the_adapted_outputs(name: str) -> None:
    base, model = MODELS[name](), adapted(name)
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert list(merged.state_dict()) == list(base.state_dict())
    assert worst_difference(outputs(merged), expected) < 1e-5


def test_merge_and_unload_merges_the_named_adapters_and_what_is_merged_only_once() -> None:
    model = adapted("gpt2", torch.float64)
    expected = DenseModel(MODELS["gpt2"](), model, ["second", "third"])(**inputs(model))
    model.merge_adapter(["second"])
    assert worst_difference(outputs(model.merge_and_unload(adapter_names=["second", "third"])), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_what_was_merged_one_by_one_is_taken_out_to_the_last_bit() -> None:
    model = adapted()
    before = {name: layer.stored().clone() for name, layer in dvora_layers(model)}
    model.merge_adapter(["second"])
    model.merge_adapter(["third"])
    model.unmerge_adapter()
    assert all(same_bits(layer.stored(), before[name]) for name, layer in dvora_layers(model))


# What rounding takes.


@torch.no_grad()
def nudge(model: nn.Module) -> PeftModel:
    """Updates far below the rounding of bfloat16, in every row of every layer."""
    for _, layer in dvora_layers(model):
        layer.dvora_magnitude["default"].mul_(1 + 1e-4)
    return model


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_is_lost_to_rounding_warns_once_with_the_figure(method: str) -> None:
    model = nudge(get_peft_model(MODELS["bert"]().bfloat16(), DVoRAConfig(r=4, target_modules=LAYERS["bert"])))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(model, method)()
    (warning,) = [each for each in caught if issubclass(each.category, MergePrecisionWarning)]
    assert re.search(r"bfloat16.*11 of 11 layers, most in bert\.[\w.]+: \d+\.\d%", str(warning.message))


def test_a_merge_that_loses_nothing_does_not_warn() -> None:
    nudge(get_peft_model(MODELS["bert"](), DVoRAConfig(r=4, target_modules=LAYERS["bert"]))).merge_adapter()
    get_peft_model(MODELS["bert"]().bfloat16(), DVoRAConfig(r=4, target_modules=LAYERS["bert"])).merge_adapter()


# Errors: all layers or none.


# Also where warnings are none: `make versions`, `make canary`.
@pytest.mark.filterwarnings("error::dvora.weight.MergePrecisionWarning")
def test_tokens_that_peft_merges_are_taken_back_too() -> None:
    config = DVoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 7])
    model = nudge(get_peft_model(MODELS["llama"]().bfloat16(), config).eval())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name).add_(0.5)
    before = snapshot(model)
    with pytest.raises(MergePrecisionWarning):
        model.merge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("dtype", "value", "strength"),
    [
        pytest.param(torch.float32, float("inf"), 1.0, id="a vector is not finite"),
        pytest.param(torch.float16, 1e30, 1.0, id="the merged weight overflows"),
        pytest.param(torch.float16, None, 1e6, id="a strength is too large"),
    ],
)
def test_a_merge_that_is_not_finite_is_refused_and_leaves_all_layers_as_they_were(
    dtype: torch.dtype, value: float | None, strength: float
) -> None:
    model = adapted("mlp", dtype)
    if value is not None:
        with torch.no_grad():
            model.get_submodule("base_model.model.lin2").dvora_magnitude["second"][0] = value
    model.set_strength({"lin2": strength}, "second")
    model.merge_adapter(["default"])
    before = snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"lin2: merging default, second gives values that are not finite"):
            merge(adapter_names=["second"])
        assert_unchanged(model, before)
        assert merged_adapters(model) == {("default",)}


def tied(base: nn.Module) -> None:
    base.twin = nn.Linear(24, 24)
    base.twin.weight = base.lin1.weight


def parametrized(base: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(base.lin1)


def packed(base: nn.Module) -> None:
    base.lin1 = PackedLinear(base.lin1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (tied, ValueError, r"lin1: its weight is tied \(.*lin1.weight and twin.weight are one tensor"),
        (parametrized, TypeError, "lin1.* parametrized"),
        (packed, TypeError, "lin1 .* keeps its weight in a format of its own"),
    ],
)
def test_a_weight_that_cannot_be_set_keeps_all_layers_from_being_merged(
    change: Callable[[nn.Module], object], error: type[Exception], message: str
) -> None:
    base = MODELS["mlp"]()
    change(base)
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin0", "lin1"]))
    train_vectors(model)
    before, inner = snapshot(model), model.base_model.model
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: merge_model(inner, None, False, False)):
        with pytest.raises(error, match=message):
            merge()
        assert_unchanged(model, before)


# What happens to a merged model.


def other_base() -> dict[str, Tensor]:
    """A state dict of the adapted model with other base weights."""
    model = adapted()
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.base_layer.weight.mul_(1.5)
    return model.state_dict()


def only(state_dict: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if part in key}


LOADS: dict[str, Callable[[PeftModel, Path], object]] = {
    "load_adapter over the name": lambda model, folder: model.load_adapter(folder, "default"),
    "a state dict of the adapter": lambda model, _: set_peft_model_state_dict(
        model, get_peft_model_state_dict(adapted()), "default"
    ),
    "another base, assigned": lambda model, _: model.load_state_dict(other_base(), assign=True),
    "one layer of another base": lambda model, _: model.load_state_dict(
        only(other_base(), "lin1.base_layer.weight"), strict=False
    ),
    "hot swap": lambda model, folder: dvora.hotswap_adapter(model, folder),
}


@pytest.mark.parametrize("name", LOADS)
def test_a_load_over_what_is_merged_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    other = adapted(adapters=1)
    train_vectors(other, "default", 5)
    other.save_pretrained(tmp_path)
    model = adapted()
    own = snapshot(model)
    model.merge_adapter()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        LOADS[name](model, tmp_path)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    model.unmerge_adapter()
    assert_unchanged(model, own)
    LOADS[name](model, tmp_path)  # as the message says


def test_training_what_is_merged_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    model.train()
    with pytest.raises(RuntimeError, match=r"lin0: adapters are merged \(default\).*call unmerge_adapter first"):
        model(torch.zeros(2, 10))
    with torch.no_grad():
        model(torch.zeros(2, 10))
    for _, layer in dvora_layers(model):
        layer.set_requires_grad(["default"], False)
    model(torch.zeros(2, 10))


# `dvora.merged`.


def test_within_merged_the_base_runs_with_the_active_adapters() -> None:
    model = adapted()
    model.set_adapter("second")
    before, own = outputs(model), snapshot(model)

    def fail() -> None:
        with dvora.merged(model):
            assert merged_adapters(model) == {("second",)}
            assert worst_difference(outputs(model), before) < 1e-5
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_unchanged(model, own)
    with dvora.merged(model):
        model.unmerge_adapter()  # which may be done within
    assert_unchanged(model, own)


def merged_model() -> nn.Module:
    model = adapted()
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapted().train(), r"call model.eval\(\) first"),
        (merged_model, "merged already"),
        (lambda: nn.Sequential().eval(), "Sequential has no DVoRA layers"),
    ],
)
def test_what_cannot_be_merged_for_a_while_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before = merged_adapters(model)
    with pytest.raises(ValueError, match=message), dvora.merged(model):
        pass
    assert merged_adapters(model) == before
