"""Which vectors are trained, layers with the magnitude only, and trained tokens beside an adapter."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from dvora import DVoRAConfig
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, dvora_layers, gradients, outputs, same_bits, train_vectors

VECTORS = ("magnitude", "lambda_b", "lambda_d")
SUBSETS = [VECTORS[:1], VECTORS[1:2], VECTORS[2:], VECTORS[:2], VECTORS[::2], VECTORS[1:], VECTORS]


@pytest.mark.parametrize("train", SUBSETS, ids="+".join)
def test_only_the_named_vectors_are_trained(train: tuple[str, ...]) -> None:
    settings = {"r": 4, "target_modules": LAYERS["mlp"], "init_weights": False}
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(**settings, train=list(train)))
    train_vectors(model)
    every = get_peft_model(MODELS["mlp"](), DVoRAConfig(**settings))
    train_vectors(every)
    found, expected = gradients(model), gradients(every)
    assert {name.split(".dvora_")[1].split(".")[0] for name in found} == set(train)
    assert all(same_bits(value, expected[name]) for name, value in found.items())
    assert len(found) == 3 * len(train)


SETTINGS = (
    *({"train": list(names)} for names in SUBSETS),
    *({"train": list(names), "init_weights": False} for names in SUBSETS),
    *({"d_initial": value, **more} for value in (0, 0.0, 1e-320, -1.0, 10) for more in ({}, {"train": ["magnitude"]})),
    *({"d_initial": 0, "init_weights": False}, {"d_initial": 0, "train": ["lambda_b"]}),
    *({"alpha": value} for value in (1e-320, 1e-46, 2**-10, 100)),
    *({"alpha": 1e-45, "train": ["magnitude"]}, {"alpha_pattern": {"lin0": 1e-45}}, {"rank_pattern": {"lin0": 9}}),
    *({"strength": value} for value in (0, 0.0, 0.5, -1, {"lin0": 0.0}, {"lin0": 0.5})),
    *({"direction": "weight"}, {"detach_norm": True}, {"dvora_dropout": 0.5}),
    *({"magnitude_modules": ["lin0"]}, {"projection_init": "structured"}),
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_accepted_setting_moves_all_that_it_says_it_trains(settings: dict[str, object]) -> None:
    try:
        config = DVoRAConfig(**{"r": 4, "target_modules": LAYERS["mlp"], **settings})
    except ValueError:
        return
    model = get_peft_model(MODELS["mlp"](), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(3):
        for name, gradient in gradients(model).items():
            # Steps of one size, as Adam takes them, as far as there is a direction.
            model.get_parameter(name).data.sub_(1e-2 * gradient.sign())
    assert {name.split(".dvora_")[1].split(".")[0] for name in before} == set(config.train)
    assert not [name for name, value in before.items() if torch.equal(value, model.get_parameter(name))]


REFUSED = [
    ("train", {"train": ["lambda_d"]}),
    ("train", {"train": ["magnitude", "lambda_d"]}),
    ("d_initial", {"d_initial": 0}),
    ("d_initial", {"d_initial": 1e-320}),
    ("d_initial", {"d_initial": 0, "train": ["lambda_b"]}),
    ("alpha", {"alpha": 1e-320}),
    ("alpha_pattern", {"alpha_pattern": {"lin0": 1e-45}}),
    ("strength", {"strength": 0.0}),
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
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path, is_trainable=is_trainable).eval()
        assert same_bits(outputs(loaded), outputs(model.eval()))


def test_the_subset_survives_switching_freezing_and_loading(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=LAYERS["mlp"], train=["lambda_b"]))
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=LAYERS["mlp"]))
    model.set_adapter("second")
    model.set_adapter("default")
    model.base_model.set_requires_grad("default", False)
    model.base_model.set_requires_grad("default", True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.lin{k}.dvora_lambda_b.default" for k in range(3)}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path, is_trainable=True)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained


def test_frozen_vectors_are_saved_all_the_same(tmp_path: Path) -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=["lin0"], train=["magnitude"]))
    model.save_pretrained(tmp_path)
    names = {f"base_model.model.lin0.dvora_{vector}" for vector in VECTORS}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names


@pytest.mark.parametrize("train", [[], ["magnitud"], "magnitude", ["magnitude", 1], None])
def test_a_subset_that_names_nothing_or_something_else_is_refused(train: object) -> None:
    with pytest.raises(ValueError, match="train must name at least one of magnitude, lambda_b, lambda_d"):
        DVoRAConfig(train=train)


def test_layers_with_the_magnitude_only_have_one_vector(tmp_path: Path) -> None:
    config = DVoRAConfig(r=4, target_modules=["lin0"], magnitude_modules=["lin1", "lin2"])
    model = get_peft_model(MODELS["mlp"](), config).eval()
    assert same_bits(outputs(model), outputs(MODELS["mlp"]()))
    assert model.get_nb_trainable_parameters()[0] == (2 * 24 + 4) + 24 + 6
    train_vectors(model)
    for name, layer in dvora_layers(model):
        if name != "lin0":
            gain = layer.vectors("default").magnitude / layer.stored().norm(dim=1)
            expected = (gain[:, None] - 1) * layer.stored()
            assert torch.allclose(layer.get_delta_weight("default"), expected, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 3 + 1 + 1
    loaded = PeftModel.from_pretrained(MODELS["mlp"](), tmp_path).eval()
    assert same_bits(outputs(loaded), outputs(model))


def test_a_layer_that_is_targeted_both_ways_gets_the_magnitude_only() -> None:
    config = DVoRAConfig(r=4, target_modules="all-linear", magnitude_modules=r"lin[12]")
    model = get_peft_model(MODELS["mlp"](), config)
    assert {name: layer.adapted("default").rank for name, layer in dvora_layers(model)} == {
        "lin0": 4,
        "lin1": 0,
        "lin2": 0,
    }


def test_magnitudes_alone_need_no_target_modules() -> None:
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(magnitude_modules=["lin1"]))
    assert [name for name, _ in dvora_layers(model)] == ["lin1"]


def test_names_of_magnitude_modules_that_match_nothing_are_refused() -> None:
    base = MODELS["mlp"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"magnitude_modules: nothing in the model is named 'lni1' \(closest: lin1"):
        get_peft_model(base, DVoRAConfig(magnitude_modules=["lni1"]))
    assert_unchanged(base, before)


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


@pytest.mark.parametrize("indices", [["5"], {"embed_tokens": [5.0]}, 5, {"embed_tokens": 5}])
def test_tokens_are_named_by_their_indices(indices: object) -> None:
    with pytest.raises(TypeError, match="trainable_token_indices must be lists of indices"):
        DVoRAConfig(trainable_token_indices=indices)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([40], "40 is no row of model.embed_tokens, which has 40"),
        ([5, 6, 5], "trainable_token_indices of 'model.embed_tokens' has some of its 3 indices twice"),
        ([-1], "-1 is no row of"),
        ([10**30], "is no row of"),
        ([], "at least one index"),
        ({"wte": [1]}, r"trainable_token_indices: \[1\] of 'wte'; the model must have a layer of that name"),
    ],
)
def test_tokens_that_no_layer_has_are_refused_before_the_model_is_touched(indices: object, message: str) -> None:
    base = MODELS["llama"]()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, DVoRAConfig(r=4, target_modules=["q_proj"], trainable_token_indices=indices))
    assert_unchanged(base, before)
