"""Several adapters in one model, their strengths, which vectors are trained, and DVoRA beside other methods."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.dense_weights import DenseModel
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, inputs, loss, outputs, same_bits, train_vectors

CONFIGS = {
    "default": {"r": 6},
    "wide": {"r": 40, "projection_seed": 3, "direction": "weight", "alpha": 20},
    "narrow": {"r": 2, "projection_seed": 1},
    "same seed": {"r": 11},
}
"""Adapters of different ranks, seeds and directions."""


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


@pytest.mark.parametrize("order", [("default", "wide", "narrow"), ("narrow", "wide", "default")], ids="-".join)
def test_the_order_of_adding_adapters_changes_no_bit_of_their_outputs(order: tuple[str, ...]) -> None:
    model = with_adapters("bert", order)
    for adapter in order:
        alone = with_adapters("bert", (adapter,))
        model.set_adapter(adapter)
        assert same_bits(outputs(model), outputs(alone))


def test_an_adapter_can_be_injected_by_the_names_in_its_state_dict() -> None:
    model = with_adapters("bert", ("default",))
    vectors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    bare = inject_adapter_in_model(config("bert", "default"), MODELS["bert"](), state_dict=vectors)
    set_peft_model_state_dict(bare, vectors)
    assert same_bits(outputs(bare), outputs(model))


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_that_is_added_takes_the_mode_of_its_layers(training: bool) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"])).train(training)
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=["lin0", "lin1"], dvora_dropout=0.5))
    train_vectors(model, "second")
    model.set_adapter("second")
    assert {module.training for module in model.base_model.model.modules()} == {training}
    assert same_bits(outputs(model), outputs(model)) is not training


# Which vectors are trained, and what beside them.


VECTORS = ("magnitude", "lambda_b", "lambda_d")


REFUSED = [
    ("train", {"train": ["lambda_d"]}),
    ("d_initial", {"d_initial": 0}),
    ("d_initial", {"d_initial": 1e-320}),
    ("alpha", {"alpha": 1e-320}),
    ("alpha_pattern", {"alpha_pattern": {"lin0": 1e-45}}),
    ("strength", {"strength": {"lin0": 0.0}}),
]


@pytest.mark.parametrize(("named", "settings"), REFUSED, ids=str)
def test_what_would_train_nothing_is_refused_and_may_be_loaded(
    named: str, settings: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{named}="):
        DVoRAConfig(r=4, target_modules=["lin0"], **settings)
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], inference_mode=True, **settings))
    train_vectors(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path, is_trainable=True).eval()
    assert same_bits(outputs(loaded), outputs(model.eval()))


def test_layers_with_the_magnitude_only_have_one_vector(tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["lin0"], magnitude_modules=["lin1", "lin2"])
    model = get_peft_model(MODELS["mlp"](), config).eval()
    assert same_bits(outputs(model), outputs(MODELS["mlp"]()))
    assert model.get_nb_trainable_parameters()[0] == (2 * 24 + 4) + 24 + 6
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3 + 1 + 1


def test_a_layer_that_is_targeted_both_ways_gets_the_magnitude_only() -> None:
    config = DVoRAConfig(r=4, target_modules="all-linear", magnitude_modules=r"lin[12]")
    model = get_peft_model(MODELS["mlp"](), config)
    assert {name: layer.adapted("default").rank for name, layer in dvora_layers(model)} == {
        "lin0": 4,
        "lin1": 0,
        "lin2": 0,
    }


def test_tokens_are_trained_saved_and_merged_beside_an_adapter(tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 7])
    model = get_peft_model(MODELS["llama"](), config).eval()
    train_vectors(model)
    tokens = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    with torch.no_grad():
        tokens[0].add_(0.5)
    expected = outputs(model)
    assert not torch.allclose(expected, outputs(MODELS["llama"]()), atol=1e-3)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(MODELS["llama"](), tmp_path).eval()
    assert same_bits(outputs(loaded), expected)
    assert torch.allclose(outputs(model.merge_and_unload()), expected, atol=1e-5)


@pytest.mark.parametrize("indices", [[40], [5, 6, 5], [-1], [], {"wte": [1]}, {"embed_tokens": [5, 50]}], ids=str)
def test_tokens_that_no_layer_has_are_refused_before_the_model_is_touched(indices: object) -> None:
    base = MODELS["llama"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"trainable_token_indices: .* expected different rows of a layer"):
        get_peft_model(base, DVoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))
    assert_unchanged(base, before)


# Other methods.


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_other_methods_on_other_layers_train_together() -> None:
    lora = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    model = inject_adapter_in_model(lora, MODELS["bert"]())
    model = inject_adapter_in_model(DVoRAConfig(r=4, target_modules=["value"]), model).eval()
    train_vectors(model)
    loss(model).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all("query.lora_" in name or "value.dvora_" in name for name in trained)
    assert len(trained) == 2 * (2 + 3)


@pytest.mark.parametrize("other", [LoraConfig(target_modules=["query"]), VeraConfig(target_modules=["query"])])
def test_a_peft_model_takes_adapters_of_one_method(other: object) -> None:
    model = get_peft_model(MODELS["bert"](), DVoRAConfig(r=4, target_modules=["query"])).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", other)
    assert_unchanged(model, before)


# Strength, and sums of adapters.


def two_adapters() -> PeftModel:
    """The tiny MLP with adapters "default" and "second", as if trained."""
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"])).eval()
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    return model


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (float("nan"), ValueError, "strength must be finite"),
        ("0.5", TypeError, "strength must be a number, got '0.5'"),
        (True, TypeError, "strength must be a number"),
        ({"lin7": 0.5}, ValueError, "strength: no layer of adapter 'default' is named 'lin7'"),
    ],
)
def test_a_bad_strength_changes_nothing(strength: object, error: type[Exception], message: str) -> None:
    model = two_adapters()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(error, match=message):
        model.set_strength(strength)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged into lin0; call unmerge_adapter first"):
        model.set_strength(0.5)


def test_a_strength_that_one_of_the_active_adapters_cannot_take_is_given_to_none() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter(["second"])
    with pytest.raises(ValueError, match="adapter 'second' is merged into lin0; call unmerge_adapter first"):
        model.set_strength(0.5)
    assert {layer.strength("default") for _, layer in dvora_layers(model)} == {1.0}
    assert model.peft_config["default"].strength == 1.0


def test_a_weighted_sum_is_refused_and_the_calls_that_are_shown_give_it_exactly() -> None:
    model = two_adapters()
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match="no single adapter") as refused:
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="svd")
    assert_unchanged(model, before)
    assert set(model.peft_config) == {"default", "second"}
    exec(str(refused.value).rpartition("too: ")[2], {"model": model})
    expected = DenseModel(MODELS["mlp"](), model, ("default", "second"))(**inputs(MODELS["mlp"]().double()))
    assert {(layer.strength("default"), layer.strength("second")) for _, layer in dvora_layers(model)} == {(0.7, -0.4)}
    assert worst_difference(outputs(model), expected) < 1e-5
    model.merge_adapter(["default", "second"])
    assert worst_difference(outputs(model), expected) < 1e-5


def test_a_strength_by_name_is_that_of_the_layers_so_named_and_a_whole_name_comes_first() -> None:
    model = two_adapters()
    model.set_strength({"lin1": 0.25})
    found = {name: float(layer.strength("default")) for name, layer in dvora_layers(model)}
    assert found == {"lin0": 1.0, "lin1": 0.25, "lin2": 1.0}
    assert {float(layer.strength("second")) for _, layer in dvora_layers(model)} == {1.0}
    base = nn.Sequential(OrderedDict(layer=nn.Linear(4, 4), sub=nn.Sequential(OrderedDict(layer=nn.Linear(4, 4)))))
    strengths = {"layer": 0.5, "sub.layer": 0.2}
    for start in (1.0, strengths):
        model = get_peft_model(copy.deepcopy(base), DVoRAConfig(r=2, target_modules=["layer"], strength=start))
        model.set_strength(strengths)
        assert {n: float(layer.strength("default")) for n, layer in dvora_layers(model)} == pytest.approx(strengths)


def test_a_training_step_does_not_wait_for_the_device_to_say_what_the_strength_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = two_adapters().train()
    asked: list[str] = []

    def recorded(read: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        def ask(tensor: Tensor) -> object:
            asked.append(Path(sys._getframe(1).f_code.co_filename).name)
            return read(tensor)

        return ask

    for name in ("__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, recorded(getattr(Tensor, name)))
    x = torch.ones(600, 10)  # enough for the folded weight
    model(x).sum().backward()
    # Of tiny gains, on the CPU only.
    assert set(asked) <= {"layer.py"}
