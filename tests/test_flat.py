"""From an adapter to a vector and back: every value, at its place, or an error and no value."""

import copy
import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dvora import DVoRAConfig
from dvora.flat import Layout
from tests.peft.kinds import GROUPS, KINDS, Kind, bits, by_groups, edit_weights, mlp, saved
from tests.peft.models_compared import assert_unchanged, snapshot
from tests.peft.tiny import MODELS, same_bits, train_vectors
from tests.recipes import tiny_models
from tests.recipes.saved_adapters import adapted

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]


def state(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT would save of the adapter, apart from what it repeats of the base."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize("name", KINDS)
def test_a_vector_takes_a_whole_adapter_to_another_model(name: str) -> None:
    model, other = KINDS[name].trained(), KINDS[name].fresh()
    layout = Layout.of(model)
    layout.from_vector(layout.to_vector(model), other)
    expected, found = state(model), state(other)
    assert expected.keys() == found.keys()
    trained = [key for key in expected if "original_module" not in key]
    assert all(same_bits(found[key], expected[key]) for key in trained)


@pytest.mark.parametrize("name", KINDS)
def test_layout_and_vector_of_a_folder_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = KINDS[name].trained()
    folder = saved(model, tmp_path)
    layout, of_folder = Layout.of(model), Layout.of(folder)
    assert of_folder == layout
    assert of_folder.digest == layout.digest
    assert hash(of_folder) == hash(layout)
    assert torch.equal(bits(of_folder.to_vector(str(folder))), bits(layout.to_vector(model)))


def test_all_that_peft_trains_of_a_head_is_in_the_vector(tmp_path: Path) -> None:
    """By ends of names: `classifier`, which PEFT names by itself, is `pre_classifier` too."""
    base = tiny_models.distilbert(tmp_path / "base")
    model = adapted(base, "dvora", task_type="SEQ_CLS", target_modules=["q_lin"])
    model.save_pretrained(tmp_path / "adapter")
    layout = Layout.of(tmp_path / "adapter")
    assert layout == Layout.of(model)
    assert {part.name.partition(".")[0] for part in layout.content.whole} == {"classifier", "pre_classifier"}
    vector = layout.to_vector(tmp_path / "adapter")
    assert torch.equal(vector, layout.to_vector(model))
    other = adapted(base, "dvora", task_type="SEQ_CLS", target_modules=["q_lin"])
    train_vectors(other, 1)
    layout.from_vector(vector + 1, other)
    assert torch.equal(layout.to_vector(other), vector + 1)
    layout.from_vector(vector, other)
    assert all(same_bits(value, state(model)[key]) for key, value in state(other).items())


def test_a_folder_of_pickled_values_has_no_layout(tmp_path: Path) -> None:
    folder = saved(mlp().trained(), tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"pickled adapter_model\.bin, which can run any code"):
        Layout.of(folder)


def test_of_several_adapters_the_named_one_is_read_and_written() -> None:
    model = mlp().trained()
    model.add_adapter("legal", DVoRAConfig(**mlp().settings))
    train_vectors(model, "legal", seed=1)
    first, second = Layout.of(model), Layout.of(model, "legal")
    assert first == second
    kept, vector = second.to_vector(model), first.to_vector(model)
    assert not torch.equal(kept, vector)
    first.from_vector(-vector, model)
    assert torch.equal(first.to_vector(model), -vector)
    assert torch.equal(second.to_vector(model), kept)


@pytest.mark.parametrize("wrap", [torch.compile, nn.Sequential], ids=["compiled", "in another module"])
def test_a_model_may_be_wrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = KINDS["classifier"].trained()
    layout, wrapped = Layout.of(model), wrap(model)
    assert Layout.of(wrapped) == layout
    vector = layout.to_vector(wrapped)
    layout.from_vector(2 * vector, wrapped)
    assert torch.equal(layout.to_vector(model), 2 * vector)


@by_groups
def test_views_write_into_their_vector(groups: int) -> None:
    model = KINDS["magnitudes"].by_groups(groups).trained()
    layout = Layout.of(model)
    vector = layout.to_vector(model)
    views = layout.views(vector)
    assert {name: tuple(map(len, three)) for name, three in views.items()} == {
        "lin0": (24, 0, 0),
        "lin1": (24, 24, 4 * groups),
        "lin2": (6, 0, 0),
    }
    views["lin1"].lambda_b.fill_(3)
    layout.from_vector(vector, model)
    assert torch.equal(model.base_model.model.lin1.vectors("default").lambda_b, torch.full((24,), 3.0))
    assert layout.views(vector.repeat(5, 1))["lin1"].lambda_d.shape == (5, 4 * groups)


def test_a_half_precision_head_is_widened_exactly_and_rounded_when_written() -> None:
    kind = Kind(lambda: MODELS["mlp"]().bfloat16(), KINDS["head"].settings)
    model = kind.fresh()
    layout = Layout.of(model)
    head = model.base_model.model.lin2.modules_to_save["default"].weight
    assert head.dtype == torch.bfloat16
    vector = layout.to_vector(model)
    assert torch.equal(vector[-head.numel() :].bfloat16(), head.flatten())
    layout.from_vector(vector + 1e-5, model)
    assert torch.equal(head.flatten(), (vector + 1e-5)[-head.numel() :].bfloat16())
    half = Kind(lambda: MODELS["mlp"]().half(), KINDS["head"].settings).fresh()
    with pytest.raises(ValueError, match=r"lin2\.weight that are too large for its dtype, torch\.float16"):
        layout.from_vector(torch.full((layout.size,), 1e5), half)


def test_one_tensor_under_two_names_gets_one_value() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.heads = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
            self.heads[1].weight = self.heads[0].weight

    model = get_peft_model(Tied(), DVoRAConfig(r=2, target_modules=["body"], modules_to_save=["heads"]))
    layout = Layout.of(model)
    vector = layout.to_vector(model)
    layout.from_vector(2 * vector, model)
    assert torch.equal(layout.to_vector(model), 2 * vector)
    vector[-1] += 1
    with pytest.raises(ValueError, match=r"heads\.0\.weight and heads\.1\.weight, which are one tensor"):
        layout.from_vector(vector, model)
    assert torch.equal(layout.to_vector(model)[:-1], 2 * vector[:-1])


def test_an_error_within_the_write_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().trained()
    layout, before = Layout.of(model), snapshot(model)

    def fails(own: list[Tensor], values: list[Tensor]) -> None:
        own[0].copy_(values[0])
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "_foreach_copy_", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        layout.from_vector(torch.ones(layout.size), model)
    assert_unchanged(model, before)


def at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    """A vector with another value in one place."""
    return lambda vector: vector.index_fill(0, torch.tensor([index]), value)


BAD_VECTORS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "a list": (lambda v: v.tolist(), TypeError, r"vector must be a tensor of 120 values, got list"),
    "too short": (lambda v: v[1:], ValueError, r"vector has shape \(119,\), expected \(120,\)"),
    "a batch": (lambda v: v.repeat(2, 1), ValueError, r"vector has shape \(2, 120\), expected \(120,\)"),
    "half": (lambda v: v.half(), TypeError, r"vector is torch\.float16, expected torch\.float32: half precision"),
    "NaN": (at(30, float("nan")), ValueError, r"not finite, the first at index 30 \(lambda_b of lin0\)"),
    "far": (at(-1, 1e38), ValueError, r"lin2: magnitude, lambda_b and lambda_d in the adapter are so large"),
    "without values": (lambda v: v.to("meta"), ValueError, r"on meta, expected a dense tensor"),
    "sparse": (lambda v: v.to_sparse(), ValueError, r"layout torch\.sparse_coo on cpu, expected a dense tensor"),
}


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_a_bad_vector_is_refused_and_nothing_is_written(name: str) -> None:
    damaged, error, message = BAD_VECTORS[name]
    model = mlp().trained()
    layout, before = Layout.of(model), snapshot(model)
    with pytest.raises(error, match=message):
        layout.from_vector(damaged(layout.to_vector(model)), model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("setting", [{"r": 5}, {"lambda_d_groups": 2}, {"r": 2, "lambda_d_groups": 2}], ids=str)
def test_an_adapter_of_another_layout_is_refused(setting: dict[str, int]) -> None:
    model, layout = mlp().trained(), Layout.of(mlp(**setting).fresh())
    before, vector = snapshot(model), torch.ones(layout.size)
    for use in (layout.to_vector, partial(layout.from_vector, vector)):
        with pytest.raises(ValueError, match=r"not that of adapter 'default' of the model.*: lin0 is out_features"):
            use(model)
    assert_unchanged(model, before)


def test_a_merged_adapter_is_read_and_not_written() -> None:
    model = mlp().trained()
    layout = Layout.of(model)
    vector = layout.to_vector(model)
    model.merge_adapter()
    before = snapshot(model)
    assert torch.equal(layout.to_vector(model), vector)
    with pytest.raises(ValueError, match=r"adapter 'default' is merged into lin0; call unmerge_adapter first"):
        layout.from_vector(2 * vector, model)
    assert_unchanged(model, before)


def test_double_and_half_vectors_are_refused(tmp_path: Path) -> None:
    double = Kind(lambda: MODELS["mlp"]().double(), mlp().settings).trained()
    layout = Layout.of(double)
    for source in (double, saved(double, tmp_path)):
        with pytest.raises(TypeError, match=r"lin0\.dvora_magnitude is torch\.float64, and a vector is float32"):
            layout.to_vector(source)
    with pytest.raises(TypeError, match=r"model: lin0\.dvora_magnitude is torch\.float64, expected torch\.float32"):
        layout.from_vector(torch.ones(layout.size), double)
    half = mlp().trained()
    half.base_model.model.lin1.dvora_lambda_b["default"].data = torch.zeros(24, dtype=torch.half)
    with pytest.raises(TypeError, match=r"model: lin1\.dvora_lambda_b is torch\.float16, expected torch\.float32"):
        layout.from_vector(torch.ones(layout.size), half)


def test_vectors_that_are_not_here_are_refused() -> None:
    model = mlp().trained()
    layout = Layout.of(model)
    vectors = model.base_model.model.lin1.dvora_magnitude
    vectors["default"] = nn.Parameter(vectors["default"].to("meta"))
    for use in (layout.to_vector, partial(layout.from_vector, torch.ones(layout.size))):
        with pytest.raises(ValueError, match=r"lin1\.dvora_magnitude is on the meta device and has no values yet"):
            use(model)


def test_a_folder_without_vectors_has_no_layout(tmp_path: Path) -> None:
    folder = saved(KINDS["head"].trained(), tmp_path)
    edit_weights(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".dvora_" in key])
    with pytest.raises(ValueError, match="has no vectors of any layer"):
        Layout.of(folder)


def test_the_folder_of_a_run_has_the_layout_of_its_adapter(tmp_path: Path) -> None:
    model = mlp().trained()
    folder = saved(model, tmp_path / "run" / "adapter")
    assert Layout.of(tmp_path / "run") == Layout.of(folder) == Layout.of(model)
    assert torch.equal(Layout.of(model).to_vector(tmp_path / "run"), Layout.of(model).to_vector(model))


def test_sources_without_an_adapter_are_named() -> None:
    model = mlp().trained()
    lora = get_peft_model(MODELS["mlp"](), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"adapter_name: there is no adapter 'legal' in .*MLP, only \['default'\]"):
        Layout.of(model, "legal")
    with pytest.raises(ValueError, match=r"there is no adapter 'default' in the model of type MLP, only \[\]"):
        Layout.of(MODELS["mlp"]())
    with pytest.raises(TypeError, match=r"'default' in the model is an adapter of type .*LORA; only DVoRA"):
        Layout.of(lora)
    with pytest.raises(TypeError, match=r"source must be a model or the folder of an adapter, got dict"):
        Layout.of({})


@by_groups
def test_a_layout_survives_json_and_does_not_change(groups: int) -> None:
    model = KINDS["tokens"].by_groups(groups).trained()
    layout = Layout.of(model)
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())), "legal")
    assert again == layout
    assert (again.content, again.digest, again.size) == (layout.content, layout.digest, layout.size)
    assert again.adapter_name == "legal"
    assert copy.deepcopy(layout) == layout
    with pytest.raises(FrozenInstanceError):
        layout.size = 3


def test_a_layout_of_one_group_is_what_it_was_before_there_were_groups() -> None:
    """Its JSON and its digest name vectors that are stored somewhere."""
    layout, by_groups = (Layout.of(mlp().by_groups(groups).fresh()) for groups in (1, GROUPS))
    written = layout.to_dict()
    assert "lambda_d_groups" not in written["settings"]
    assert written["layers"] == [["lin0", 24, 4, 1.0], ["lin1", 24, 4, 1.0], ["lin2", 6, 4, 1.0]]
    assert layout.digest == "febb4bdc6be05fb2"
    assert by_groups.to_dict()["layers"][0] == ["lin0", 24, 4, 1.0, GROUPS]
    assert by_groups.digest != layout.digest
    assert repr(by_groups).endswith("2 of 24 x r4 in 3 groups, 1 of 6 x r4 in 3 groups)")


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another version": (lambda d: {**d, "format_version": 2}, r"format_version 2, expected 1"),
    "not a layout": (lambda d: [d], r"format_version None, expected 1"),
    "something missing": (lambda d: {k: v for k, v in d.items() if k != "base"}, r"no layout can be read.*'base'"),
    "a changed size": (lambda d: {**d, "layers": [["lin0", 25, 4, 1.0], *d["layers"][1:]]}, r"was changed on the way"),
    "a size of text": (lambda d: {**d, "whole": [["w", ["a", 10**12]]]}, r"no layout can be read.*whole numbers"),
    "groups of none": (lambda d: {**d, "layers": [["lin0", 24, 4, 1.0, -1]]}, r"no layout can be read.*whole numbers"),
    "groups that it has not": (
        lambda d: {**d, "layers": [["lin0", 24, 4, 1.0, 2], *d["layers"][1:]]},
        r"was changed on the way",
    ),
    "no group": (lambda d: {**d, "layers": [["lin0", 24, 4, 1.0, 0]]}, r"no layout can be read.*whole numbers"),
    "groups of text": (lambda d: {**d, "layers": [["lin0", 24, 4, 1.0, "2"]]}, r"no layout can be read"),
    "a size below zero": (lambda d: {**d, "layers": [["lin0", -1, 4, 1.0]]}, r"no layout can be read.*whole numbers"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_layout_is_refused(name: str) -> None:
    damage, message = DAMAGES[name]
    with pytest.raises(ValueError, match=message):
        Layout.from_dict(damage(Layout.of(mlp().fresh()).to_dict()))
