"""What an adapter consists of: when two are interchangeable, and one in the place of another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import dvora
from dvora import DVoRAConfig
from dvora.flat import Layout
from dvora.peft.layer import layers_in
from tests.peft.adapter_files import edit_config, edit_weights
from tests.peft.kinds import KINDS, Kind, mlp, saved
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import LAYERS, MODELS, outputs, same_bits, train_vectors

OTHER_VECTORS: dict[str, dict[str, Any]] = {
    "rank": {"r": 5},
    "rank of one layer": {"rank_pattern": {"lin1": 5}},
    "alpha": {"alpha": 2},
    "alpha of one layer": {"alpha_pattern": {"lin1": 2}},
    "direction": {"direction": "weight"},
    "seed": {"projection_seed": 1},
    "distribution": {"projection_init": "kaiming_uniform"},
    "layers": {"target_modules": ["lin0", "lin1"]},
    "a magnitude only": {"magnitude_modules": ["lin1"]},
    "biases": {"bias": "dvora_only"},
    "a head": {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]},
}

SAME_VECTORS: dict[str, dict[str, Any]] = {
    "alpha that is the rank": {"alpha": 4},
    "names of layers": {"target_modules": "lin[012]"},
    "starting values": {"d_initial": 0.3, "init_weights": False},
    "gradients": {"detach_norm": True, "dvora_dropout": 0.1, "train": ["magnitude"]},
    "strength": {"strength": 0.5},
    "matrices": {"save_projection": True},
}


def test_the_digest_is_the_same_on_every_machine() -> None:
    # Another value needs another FORMAT_VERSION: both sides of a connection compare it.
    assert Layout.of(mlp().fresh(projection_init="kaiming_uniform")).digest == "febb4bdc6be05fb2"


@pytest.mark.parametrize("name", OTHER_VECTORS)
def test_what_changes_the_meaning_of_a_value_changes_the_digest(name: str, tmp_path: Path) -> None:
    layout, other = Layout.of(mlp().fresh()), mlp().fresh(**OTHER_VECTORS[name])
    for source in (other, saved(other, tmp_path)):
        assert Layout.of(source).digest != layout.digest
        assert Layout.of(source) != layout
    assert layout.content.difference(Layout.of(other).content)


@pytest.mark.parametrize("name", SAME_VECTORS)
def test_nothing_else_changes_it(name: str, tmp_path: Path) -> None:
    layout, same = Layout.of(mlp().fresh()), mlp().trained(**SAME_VECTORS[name])
    for source in (same, saved(same, tmp_path)):
        assert Layout.of(source).digest == layout.digest
        assert Layout.of(source) == layout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seed", "projection_seed is 0 here and 1 there"),
        ("rank of one layer", "lin1 is out_features 24, rank 4, scaling 1.0 here and out_features 24, rank 5"),
        ("layers", "lin2 is out_features 6, rank 4, scaling 1.0 here and absent there"),
        ("biases", r"lin0.bias is absent here and shape (24,) there"),
    ],
)
def test_the_first_difference_is_named(name: str, words: str) -> None:
    difference = Layout.of(mlp().fresh()).content.difference(Layout.of(mlp().fresh(**OTHER_VECTORS[name])).content)
    assert difference is not None
    assert difference.startswith(words)


def test_another_base_has_the_digest_and_not_the_layout(tmp_path: Path) -> None:
    def another() -> nn.Module:
        model = MODELS["mlp"]()
        with torch.no_grad():
            model.lin1.weight.copy_(model.lin1.weight.flip(0))
        return model

    model, other = mlp().trained(), Kind(another, mlp().settings).trained()
    layout = Layout.of(saved(model, tmp_path))
    assert Layout.of(other).digest == layout.digest
    assert Layout.of(other) != layout
    with pytest.raises(ValueError, match="the base models differ: norm and random projections of the weight of lin1"):
        layout.from_vector(layout.to_vector(tmp_path), other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_in_another_dtype_is_the_same(dtype: torch.dtype) -> None:
    cast = Kind(lambda: MODELS["mlp"]().to(dtype), mlp().settings)
    assert Layout.of(cast.fresh()) == Layout.of(mlp().fresh())


def test_a_base_that_was_trained_since_is_seen_as_it_is_now() -> None:
    model = mlp().fresh()
    layout = Layout.of(model)
    with torch.no_grad():
        model.base_model.model.lin0.base_layer.weight.neg_()
    assert Layout.of(model) != layout


def test_without_fingerprints_any_base_will_do(tmp_path: Path) -> None:
    folder = saved(mlp().trained(), tmp_path)
    edit_config(folder, base_probes=None)
    assert Layout.of(folder) == Layout.of(mlp().fresh())


def test_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(KINDS["head"].trained(), tmp_path)
    monkeypatch.setattr("dvora.peft.content.load_peft_weights", None)
    assert Layout.of(folder).size == 248


def rewritten(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """Change the values in a folder."""
    return lambda folder: edit_weights(folder, change)


def setting(name: str, value: object) -> Callable[[Path], object]:
    """Change a setting in a folder."""
    return lambda folder: edit_config(folder, **{name: value})


PREFIX = "base_model.model.lin1.dvora_"

BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no configuration": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        ValueError,
        r"is no folder with a saved adapter: it has no adapter_config\.json",
    ),
    "no values": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ValueError,
        r"has a configuration and no file of values",
    ),
    "another format": (setting("projection_format", 2), ValueError, r"projection_format is 2.*makes format 1"),
    "another rank": (setting("r", 5), ValueError, r"lambda_d has shape \(4,\) in the adapter and \(5,\)"),
    "other matrices": (setting("projection_fingerprint", "0"), ValueError, r"other shared matrices"),
    "half a layer": (
        rewritten(lambda values: values.pop(f"{PREFIX}lambda_b")),
        ValueError,
        r"lin1 has vectors .* in the adapter's file, expected magnitude \(O,\), lambda_b \(O,\)",
    ),
    "no magnitude": (rewritten(lambda v: v.pop(f"{PREFIX}magnitude")), ValueError, r"lin1 has vectors"),
    "a matrix": (rewritten(lambda v: v.update({f"{PREFIX}magnitude": torch.ones(4, 6)})), ValueError, r"lin1 has"),
    "a number": (rewritten(lambda v: v.update({f"{PREFIX}magnitude": torch.ones(())})), ValueError, r"lin1 has"),
    "nothing of a layer": (
        rewritten(lambda v: [v.update({f"{PREFIX}{each}": torch.ones(0)}) for each in ("magnitude", "lambda_b")]),
        ValueError,
        r"lin1 has",
    ),
    "an unknown vector": (rewritten(lambda v: v.update({f"{PREFIX}x": torch.ones(4)})), ValueError, r"lin1 has"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_damaged_folder_is_refused(name: str, tmp_path: Path) -> None:
    damage, error, message = BAD_FOLDERS[name]
    model = KINDS["head"].trained()
    layout, folder = Layout.of(model), saved(model, tmp_path)
    damage(folder)
    with pytest.raises(error, match=message):
        Layout.of(folder)
    with pytest.raises(error, match=message):
        layout.to_vector(folder)


def test_a_folder_without_any_vector_is_refused(tmp_path: Path) -> None:
    folder = saved(KINDS["head"].trained(), tmp_path)
    rewritten(lambda values: [values.pop(key) for key in list(values) if ".dvora_" in key])(folder)
    with pytest.raises(ValueError, match="adapter 'default' has no vectors of any layer"):
        Layout.of(folder)


def test_half_precision_in_a_file_is_widened(tmp_path: Path) -> None:
    folder = saved(mlp().trained(), tmp_path)
    vector = Layout.of(folder).to_vector(folder)
    rewritten(lambda values: values.update({key: value.bfloat16() for key, value in values.items()}))(folder)
    widened = Layout.of(folder).to_vector(folder)
    assert widened.dtype == torch.float32
    assert torch.equal(widened, vector.bfloat16().float())


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"is an adapter of type .*LORA; only DVoRA adapters are read here"):
        Layout.of(tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6)

    model = Kind(Counting, {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}).fresh()
    for source in (model, saved(model, tmp_path)):
        with pytest.raises(TypeError, match=r"head\.num_batches_tracked is torch\.int64, and a vector is float32"):
            Layout.of(source).to_vector(source)


def trained(seed: int, **settings: object) -> PeftModel:
    config = DVoRAConfig(**{"r": 6, "target_modules": LAYERS["llama"], **settings})
    model = get_peft_model(MODELS["llama"](), config).eval()
    train_vectors(model, seed=seed)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trained(1, strength={"v_proj": 0.5}).save_pretrained(tmp_path)
    return tmp_path


def test_the_model_answers_as_the_adapter_that_was_swapped_in(folder: Path) -> None:
    model = trained(2)
    parameters = dict(model.named_parameters())
    dvora.hotswap_adapter(model, folder)
    assert same_bits(outputs(model), outputs(PeftModel.from_pretrained(MODELS["llama"](), folder).eval()))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("matrices", ["structured", "kaiming_uniform"])
def test_a_compiled_model_is_not_compiled_again(matrices: str, tmp_path: Path) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        trained(seed, strength=1 - 0.1 * seed, projection_init=matrices).save_pretrained(folder)
    compilations = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    torch.compiler.reset()
    model = trained(9, projection_init=matrices)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    outputs(compiled)
    assert len(compilations) == 1
    for folder in folders:
        dvora.hotswap_adapter(compiled, folder)
        expected = outputs(PeftModel.from_pretrained(MODELS["llama"](), folder).eval())
        assert torch.allclose(outputs(compiled), expected, atol=1e-5)
    model.set_strength(0.0)
    with model.disable_adapter():
        base = outputs(model)
    assert torch.allclose(outputs(compiled), base, atol=1e-6)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, "rank 5, scaling 1.0 here and out_features 32, rank 6"),
        ({"alpha": 3.0}, "scaling 0.5 here and out_features 32, rank 6, scaling 1.0 there"),
        ({"direction": "weight"}, "direction is 'weight' here and 'unit' there"),
        ({"projection_seed": 5}, "projection_seed is 5 here and 0 there"),
        ({"projection_init": "kaiming_uniform"}, "projection_init is 'kaiming_uniform'"),
        ({"target_modules": ["q_proj"]}, "down_proj is absent here"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is shape .* here and absent there"),
    ],
)
def test_an_adapter_that_differs_in_more_than_values_is_refused(
    settings: dict[str, object], message: str, folder: Path
) -> None:
    model = trained(2, **settings)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=message):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.popitem(), r"has vectors .* in the adapter's file, expected magnitude"),
        (lambda tensors: [value.fill_(torch.nan) for value in tensors.values()], "not finite"),
    ],
)
def test_a_damaged_adapter_is_refused_whole(
    edit: Callable[[dict[str, Tensor]], object], message: str, folder: Path
) -> None:
    model = trained(2, strength=0.25)
    before, expected = snapshot(model), outputs(model)
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=message):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    assert model.peft_config["default"].strength == 0.25


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    model = trained(2)
    before = snapshot(model)
    edit_config(folder, base_probes={layer.name: [1.0] * 9 for layer in layers_in(model)})
    with pytest.raises(ValueError, match="the base models differ"):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)


def test_a_merged_adapter_is_not_overwritten(folder: Path) -> None:
    model = trained(2)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into .*; call unmerge_adapter first"):
        dvora.hotswap_adapter(model, folder)


def test_an_adapter_of_another_method_is_refused(tmp_path: Path) -> None:
    get_peft_model(MODELS["llama"](), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"is an adapter of type .*LORA; only DVoRA"):
        dvora.hotswap_adapter(trained(2), tmp_path)


def test_a_name_that_is_not_loaded_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no adapter 'other' in the model of type \w+, only \['default'\]"):
        dvora.hotswap_adapter(trained(2), folder, "other")
