"""What an adapter consists of: when two are interchangeable, and one in the place of another."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dvora
from dvora.flat import Layout
from tests.peft.kinds import CONFIG, KINDS, WEIGHTS, Kind, edit_config, mlp, saved
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import MODELS, outputs

OTHER_VECTORS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 5}, "lin0 is out_features 24, rank 4, scaling 1.0 here and out_features 24, rank 5"),
    "rank of one layer": ({"rank_pattern": {"lin1": 5}}, "lin1 is out_features 24, rank 4"),
    "groups": ({"lambda_d_groups": 2}, "lin0 is .* scaling 1.0 here and .* scaling 1.0, groups 2 there"),
    "alpha": ({"alpha": 2}, "lin0 is .* scaling 1.0 here and .* scaling 0.5 there"),
    "alpha of one layer": ({"alpha_pattern": {"lin1": 2}}, "lin1 is .* scaling 1.0 here and .* scaling 0.5 there"),
    "direction": ({"direction": "weight"}, "direction is 'unit' here and 'weight' there"),
    "seed": ({"projection_seed": 1}, "projection_seed is 0 here and 1 there"),
    "distribution": (
        {"projection_init": "peft_vera(r=4, in=24, out=24)"},
        "projection_init is 'kaiming_uniform' here and 'peft_vera",
    ),
    "layers": ({"target_modules": ["lin0", "lin1"]}, "lin2 is out_features 6, rank 4, scaling 1.0 here and absent"),
    "a magnitude only": ({"magnitude_modules": ["lin1"]}, "lin1 is .* rank 4, scaling 1.0 here and .* rank 0"),
    "biases": ({"bias": "dvora_only"}, r"lin0.bias is absent here and shape \(24,\) there"),
    "a head": ({"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"]}, "lin2 is .* here and absent there"),
}
"""Settings that change the meaning of a value, and what is said of them."""

SAME_VECTORS: dict[str, dict[str, Any]] = {
    "alpha that is the rank": {"alpha": 4},
    "names of layers": {"target_modules": "lin[012]"},
    "starting values": {"d_initial": 0.3, "init_weights": False},
    "gradients": {"detach_norm": True, "dvora_dropout": 0.1, "train": ["magnitude"]},
    "strength": {"strength": 0.5},
}


def test_the_digest_is_the_same_on_every_machine() -> None:
    # Another value needs another FORMAT_VERSION: both sides of a connection compare it.
    assert Layout.of(mlp().fresh()).digest == "febb4bdc6be05fb2"


@pytest.mark.parametrize("name", OTHER_VECTORS)
def test_what_changes_the_meaning_of_a_value_makes_another_adapter(name: str, tmp_path: Path) -> None:
    settings, words = OTHER_VECTORS[name]
    model, other = mlp().trained(), mlp().trained(**settings)
    layout, folder = Layout.of(model), saved(other, tmp_path)
    for source in (other, folder):
        assert Layout.of(source).digest != layout.digest
        assert Layout.of(source) != layout
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"cannot take the values .*: {words}"):
        dvora.hotswap_adapter(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", SAME_VECTORS)
def test_nothing_else_changes_it(name: str, tmp_path: Path) -> None:
    layout, same = Layout.of(mlp().fresh()), mlp().trained(**SAME_VECTORS[name])
    for source in (same, saved(same, tmp_path)):
        assert Layout.of(source).digest == layout.digest
        assert Layout.of(source) == layout


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
    before = snapshot(other)
    with pytest.raises(ValueError, match="the base models differ: norm and random projections of the weight of lin1"):
        layout.from_vector(layout.to_vector(tmp_path), other)
    with pytest.raises(ValueError, match="the base models differ"):
        dvora.hotswap_adapter(other, tmp_path)
    assert_unchanged(other, before)


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


def test_only_headers_are_read(tmp_path: Path) -> None:
    folder = saved(KINDS["head"].trained(), tmp_path)
    content = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    (folder / WEIGHTS).write_bytes(content[:header] + b"\xff" * (len(content) - header))
    assert Layout.of(folder).size == 248
    with pytest.raises(ValueError, match="not finite"):
        dvora.hotswap_adapter(KINDS["head"].fresh(), folder)


def test_a_folder_that_misses_one_of_its_files_is_refused(tmp_path: Path) -> None:
    folder = saved(mlp().trained(), tmp_path)
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        for read in (Layout.of, partial(dvora.hotswap_adapter, mlp().fresh())):
            with pytest.raises(ValueError, match=f"there is no file {name}, so it is no folder with a saved"):
                read(folder)


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path)
    for read in (Layout.of, partial(dvora.hotswap_adapter, mlp().fresh())):
        with pytest.raises(ValueError, match="is an adapter of type LORA; only those of DVoRA have vectors"):
            read(tmp_path)


def test_integers_are_refused(tmp_path: Path) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6)

    model = Kind(Counting, {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}).fresh()
    for source in (model, saved(model, tmp_path)):
        with pytest.raises(TypeError, match=r"head\.num_batches_tracked is torch\.int64, and a vector is float32"):
            Layout.of(source).to_vector(source)


# A hot swap gives the bits of the adapter, for every layer type: `test_support.py`.


def test_a_compiled_model_is_compiled_again_for_another_strength_only(tmp_path: Path) -> None:
    compilations = []

    def counting(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    torch.compiler.reset()
    model = mlp().trained(9)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    outputs(compiled)
    assert len(compilations) == 1
    for seed in range(3):
        other = mlp().trained(seed)
        dvora.hotswap_adapter(compiled, saved(other, tmp_path / str(seed)))
        assert torch.allclose(outputs(compiled), outputs(other), atol=1e-5)
    assert len(compilations) == 1
    model.set_strength(0.0)
    assert torch.allclose(outputs(compiled), outputs(MODELS["mlp"]()), atol=1e-6)
    assert len(compilations) == 2


def test_a_name_that_is_not_loaded_is_refused(tmp_path: Path) -> None:
    folder = saved(mlp().trained(), tmp_path)
    with pytest.raises(ValueError, match=r"there is no adapter 'other' in the model of type \w+, only \['default'\]"):
        dvora.hotswap_adapter(mlp().fresh(), folder, "other")
