"""A new adapter changes nothing, in any dtype; its vectors and the shared matrices stay in float32 or float64."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dvora import DVoRAConfig, SharedProjections
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, outputs, same_bits, train_vectors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]


def adapted(name: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS[name], **options})
    return get_peft_model(MODELS[name]().to(dtype), config)


def vector_dtypes(model: nn.Module) -> set[torch.dtype]:
    return {vector.dtype for _, layer in dvora_layers(model) for vector in layer.vectors("default")}


def projections(model: nn.Module) -> list[SharedProjections]:
    """The distinct objects."""
    return list({id(m): m for m in model.modules() if isinstance(m, SharedProjections)}.values())


@pytest.mark.parametrize(
    ("dtype", "direction"), [*((dtype, "unit") for dtype in DTYPES), (torch.float32, "weight")], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_returns_the_bits_of_the_base(name: str, dtype: torch.dtype, direction: str) -> None:
    base = outputs(MODELS[name]().to(dtype))
    assert same_bits(outputs(adapted(name, dtype, direction=direction)), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merging_a_new_adapter_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    before = {key: value.clone() for key, value in MODELS[name]().to(dtype).state_dict().items()}
    merged = adapted(name, dtype).merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    assert all(same_bits(merged[key], before[key]) for key in before)


def test_without_init_weights_a_new_adapter_is_not_the_identity_and_always_the_same() -> None:
    base = outputs(MODELS["bert"]())
    first, second = (outputs(adapted("bert", init_weights=False)) for _ in range(2))
    assert worst_difference(first, base) > 0.01
    assert same_bits(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_a_half_precision_base_are_float32(dtype: torch.dtype) -> None:
    assert vector_dtypes(adapted("llama", dtype)) == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_casting_the_model_to_half_precision_leaves_vectors_and_matrices_alone(dtype: torch.dtype) -> None:
    model = adapted("gpt2")
    train_vectors(model)
    vectors = [[v.clone() for v in layer.vectors("default")] for _, layer in dvora_layers(model)]
    matrices = {k: v.clone() for k, v in projections(model)[0].saved_tensors().items()}
    model.to(dtype)
    for (_, layer), before in zip(dvora_layers(model), vectors, strict=True):
        assert layer.base_layer.weight.dtype == dtype
        assert all(same_bits(now, was) for now, was in zip(layer.vectors("default"), before, strict=True))
    assert all(same_bits(v, matrices[k]) for k, v in projections(model)[0].saved_tensors().items())
    assert all(v.requires_grad for _, layer in dvora_layers(model) for v in layer.vectors("default"))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16()], ids=["half", "bfloat16"])
def test_the_named_casts_do_the_same(cast: Callable[[PeftModel], PeftModel]) -> None:
    assert vector_dtypes(cast(adapted("mlp"))) == {torch.float32}


def test_double_widens_vectors_and_norms() -> None:
    model = adapted("mlp").double()
    assert vector_dtypes(model) == {torch.float64}
    assert outputs(model).dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_outputs_are_those_of_float32_up_to_rounding(dtype: torch.dtype) -> None:
    model, half = adapted("llama"), adapted("llama", dtype)
    for each in (model, half):
        train_vectors(each)
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.01
    assert worst_difference(outputs(half), outputs(model)) < tolerance


def test_large_activations_that_the_float16_base_can_bear_do_not_overflow_in_the_adapter() -> None:
    x = 3000 * torch.ones(2, 1024, dtype=torch.float16)
    x[:, ::2] *= -1
    base = nn.Sequential(nn.Linear(1024, 64, dtype=torch.float16))
    expected = base(x).detach()
    assert expected.isfinite().all()
    model = get_peft_model(base, DVoRAConfig(r=64, target_modules=["0"]))
    with torch.no_grad():
        assert same_bits(model(x), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_keeps_a_new_adapter_the_identity(dtype: torch.dtype) -> None:
    base, model = MODELS["bert"](), adapted("bert")
    with torch.autocast("cpu", dtype):
        assert same_bits(outputs(model), outputs(base))


def test_one_projections_object_serves_all_layers_and_adapters_of_a_seed() -> None:
    dense: dict[str, Any] = {"projection_init": "kaiming_uniform"}
    model = adapted("bert", **dense)
    model.add_adapter("wider", DVoRAConfig(r=70, target_modules="all-linear", **dense))
    model.add_adapter("other layers", DVoRAConfig(r=3, target_modules=["key"], **dense))
    (shared,) = projections(model)
    assert set(shared.saved_tensors()) == {"stream_0", "stream_1"}
    layers = [layer for _, layer in dvora_layers(model)]
    for name in model.peft_config:
        assert all(layer.adapted(name).shared is shared for layer in layers if name in layer.dvora_adapted)


def test_adapters_of_other_seeds_and_distributions_have_projections_of_their_own() -> None:
    model = adapted("mlp")
    model.add_adapter("seed", DVoRAConfig(r=4, target_modules=["lin0"], projection_seed=5))
    model.add_adapter("distribution", DVoRAConfig(r=4, target_modules=["lin0"], projection_init="kaiming_uniform"))
    model.add_adapter("same", DVoRAConfig(r=8, target_modules=["lin0"], projection_seed=5))
    found = {(each.seed, each.distribution) for each in projections(model)}
    assert found == {(0, "structured"), (5, "structured"), (0, "kaiming_uniform")}
    assert len(projections(model)) == 3


def test_the_state_dict_holds_three_vectors_a_layer_and_the_base() -> None:
    base = MODELS["bert"]().state_dict()
    model = adapted("bert")
    layers = [name for name, _ in dvora_layers(model)]
    vectors = {f"{n}.dvora_{v}.default" for n in layers for v in ("magnitude", "lambda_b", "lambda_d")}
    own = {key.removeprefix("base_model.model.").replace(".base_layer", "") for key in model.state_dict()}
    assert own == vectors | base.keys()


def test_a_merged_model_can_be_copied_and_the_copy_unmerged() -> None:
    base = {k: v.clone() for k, v in MODELS["mlp"]().state_dict().items()}
    model = adapted("mlp")
    train_vectors(model)
    model.merge_adapter()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin.unmerge_adapter()
    restored = twin.unload().state_dict()
    assert all(same_bits(restored[key], base[key]) for key in base)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_layers_are_wrapped_and_only_adapters_train_as_with_lora(name: str) -> None:
    ours = adapted(name)
    theirs = get_peft_model(MODELS[name](), LoraConfig(r=6, target_modules=LAYERS[name], fan_in_fan_out=name == "gpt2"))
    assert ours.targeted_module_names == theirs.targeted_module_names
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n.rpartition(".dvora_")[0] for n in trainable} == {
        n.rpartition(".lora_")[0] for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert all(".dvora_" in n for n in trainable)
