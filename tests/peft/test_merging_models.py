"""Merging into the base's weights and taking it back, bit for bit."""

import itertools
import re
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig, MergePrecisionWarning
from tests.peft.dense import dense_model
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ADAPTERS = ["default", "second", "third"]
# These adapters do so much that half precision keeps their updates, up to its own rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


# PEFT says so at every merge that follows another, here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")


def adapted(name: str, dtype: torch.dtype = torch.float32, adapters: int = 3) -> PeftModel:
    """A model with trained adapters of several ranks and seeds, the first active."""
    model = get_peft_model(MODELS[name]().to(dtype), DVoRAConfig(r=6, target_modules=LAYERS[name]))
    for seed, adapter in enumerate(ADAPTERS[1:adapters], start=1):
        model.add_adapter(adapter, DVoRAConfig(r=3 * seed, target_modules=LAYERS[name], projection_seed=seed))
    for seed, adapter in enumerate(ADAPTERS[:adapters]):
        train_vectors(model, adapter, seed)
    return model.eval()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.base_layer.weight.detach().clone() for name, layer in dvora_layers(model)}


def merged_adapters(model: nn.Module) -> set[tuple[str, ...]]:
    return {tuple(layer.merged_adapters) for _, layer in dvora_layers(model)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merged_outputs_equal_unmerged_ones(name: str, dtype: torch.dtype) -> None:
    # Llama and T5 normalise in float32 even in a float64 model.
    tolerance = max(TOLERANCE[dtype], 1e-6 if name in ("llama", "t5") else 0)
    model = adapted(name, dtype)
    before = outputs(model)
    model.merge_adapter()
    assert merged_adapters(model) == {("default",)}
    assert worst_difference(outputs(model), before) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_the_merged_weight_is_the_dense_one(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype)
    rebuilt = dense_model(model, ADAPTERS)
    model.merge_adapter(ADAPTERS)
    for layer_name, layer in dvora_layers(model):
        expected = rebuilt.get_submodule(layer_name).weight()
        merged = layer.layer_type.layout.matrix(layer.base_layer.weight)
        assert worst_difference(merged.detach(), expected.detach()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_unmerge_restores_every_bit(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype)
    before, expected = snapshot(model), outputs(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert merged_adapters(model) == {()}
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "order"),
    [
        *itertools.product(["mlp"], [torch.float32, torch.bfloat16], itertools.permutations(ADAPTERS)),
        *itertools.product(["gpt2"], DTYPES, [tuple(ADAPTERS[::-1])]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_unmerge_after_several_merges_in_any_order_restores_every_bit(
    name: str, dtype: torch.dtype, order: tuple[str, ...]
) -> None:
    model = adapted(name, dtype)
    before = snapshot(model)
    for adapter in order:
        model.merge_adapter([adapter])
    assert merged_adapters(model) == {order}
    model.unmerge_adapter()
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_adapters_merged_one_by_one_equal_them_merged_at_once_and_the_sum_of_their_updates(name: str) -> None:
    model = adapted(name, torch.float64)
    expected = outputs(dense_model(model, ADAPTERS))
    model.merge_adapter(ADAPTERS)
    at_once = base_weights(model)
    model.unmerge_adapter()
    for adapter in ADAPTERS:
        model.merge_adapter([adapter])
    one_by_one = base_weights(model)
    assert all(worst_difference(one_by_one[key], at_once[key]) < 1e-15 for key in at_once)
    assert worst_difference(outputs(model), expected) < 1e-12


def test_merging_twice_warns_and_does_nothing_more_as_with_lora() -> None:
    model = adapted("mlp")
    model.merge_adapter()
    once = base_weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    assert all(same_bits(w, once[name]) for name, w in base_weights(model).items())


def test_unmerging_an_unmerged_model_warns_and_does_nothing() -> None:
    model = adapted("mlp")
    before = snapshot(model)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_unchanged(model, before)


def test_an_adapter_is_merged_where_it_is() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"]))
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin1"]))
    model.merge_adapter(["second"])
    assert {name: layer.merged_adapters for name, layer in dvora_layers(model)} == {"lin0": [], "lin1": ["second"]}


def test_adding_an_adapter_to_a_merged_model_unmerges_it_as_with_lora() -> None:
    model, unmerged = adapted("mlp", adapters=1), adapted("mlp", adapters=1)
    model.merge_adapter()
    config = DVoRAConfig(r=5, target_modules=LAYERS["mlp"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("late", config)
    unmerged.add_adapter("late", config)
    for each in (model, unmerged):
        train_vectors(each, "late", seed=4)
        each.set_adapter("late")
    assert same_bits(outputs(model), outputs(unmerged))


def test_the_base_can_be_trained_between_merges() -> None:
    model = adapted("mlp", torch.float64, adapters=2)
    for shift in (0.1, -0.3):
        for adapter in ("default", "second"):
            model.merge_adapter([adapter])
        model.unmerge_adapter()
        with torch.no_grad():
            for _, layer in dvora_layers(model):
                layer.base_layer.weight.mul_(1 + shift)
        model.merge_adapter(["second"])
        model.merge_adapter(["default"])
        merged = outputs(model)
        model.unmerge_adapter()
        assert worst_difference(merged, outputs(dense_model(model, ["default", "second"]))) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_returns_a_plain_base_with_the_adapted_outputs(name: str) -> None:
    base = MODELS[name]()
    model = adapted(name)
    expected = outputs(model)
    merged = model.merge_and_unload()
    assert {n: type(m) for n, m in merged.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    assert list(merged.state_dict()) == list(base.state_dict())
    assert worst_difference(outputs(merged), expected) < 1e-5


def test_merge_and_unload_merges_the_named_adapters() -> None:
    model = adapted("gpt2", torch.float64)
    expected = outputs(dense_model(model, ["second", "third"]))
    assert worst_difference(outputs(model.merge_and_unload(adapter_names=["second", "third"])), expected) < 1e-12


def test_merge_and_unload_of_a_merged_model_merges_once() -> None:
    model = adapted("mlp")
    model.merge_adapter()
    expected = outputs(model)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        merged = model.merge_and_unload()
    assert same_bits(outputs(merged), expected)


def test_a_safe_merge_of_sound_adapters_is_a_merge() -> None:
    safe, plain = adapted("mlp"), adapted("mlp")
    safe.merge_adapter(safe_merge=True)
    plain.merge_adapter()
    assert same_bits(outputs(safe), outputs(plain))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        pytest.param(torch.float32, float("inf"), id="a vector is not finite"),
        pytest.param(torch.float32, float("nan"), id="a vector is NaN"),
        pytest.param(torch.float16, 1e30, id="the merged weight overflows"),
    ],
)
def test_a_merge_that_is_not_finite_is_refused_and_leaves_all_layers_as_they_were(
    dtype: torch.dtype, value: float, method: str
) -> None:
    model = adapted("mlp", dtype)
    with torch.no_grad():
        model.get_submodule("base_model.model.lin2").dvora_magnitude["default"][0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lin2: .*default.* not finite"):
        getattr(model, method)(safe_merge=True)
    assert_unchanged(model, before)
    assert merged_adapters(model) == {()}


def test_merging_into_a_weight_that_another_layer_reads_is_refused() -> None:
    base = MODELS["mlp"]()
    base.twin = nn.Linear(24, 24)
    base.twin.weight = base.lin1.weight
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin0", "lin1"]))
    train_vectors(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"lin1: its weight is tied \(.*lin1.weight and twin.weight are one tensor"):
        model.merge_adapter()
    assert_unchanged(model, before)


def test_merging_into_a_weight_that_is_computed_in_every_pass_is_refused() -> None:
    base = MODELS["mlp"]()
    nn.utils.parametrizations.weight_norm(base.lin1)
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=["lin0", "lin1"]))
    train_vectors(model)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"lin1.* parametrized"):
        model.merge_adapter()
    assert_unchanged(model, before)


@torch.no_grad()
def nudge(model: nn.Module) -> None:
    """Updates far below the rounding of bfloat16, in every row of every layer."""
    for _, layer in dvora_layers(model):
        layer.dvora_magnitude["default"].mul_(1 + 1e-4)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merge_that_is_lost_to_rounding_warns_once_with_the_figure(dtype: torch.dtype, method: str) -> None:
    model = get_peft_model(MODELS["bert"]().to(dtype), DVoRAConfig(r=4, target_modules=LAYERS["bert"]))
    nudge(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(model, method)()
    (warning,) = [each for each in caught if issubclass(each.category, MergePrecisionWarning)]
    message = str(warning.message)
    assert str(dtype) in message
    assert "11 of 11 layers" in message
    assert re.search(r"most in bert\.[\w.]+: \d+\.\d%", message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_merge_in_full_precision_does_not_warn(dtype: torch.dtype) -> None:
    model = get_peft_model(MODELS["bert"]().to(dtype), DVoRAConfig(r=4, target_modules=LAYERS["bert"]))
    nudge(model)
    model.merge_adapter()  # warnings are errors


def test_an_untrained_adapter_merges_without_a_warning() -> None:
    model = get_peft_model(MODELS["bert"]().to(torch.bfloat16), DVoRAConfig(r=4, target_modules=LAYERS["bert"]))
    model.merge_adapter()
