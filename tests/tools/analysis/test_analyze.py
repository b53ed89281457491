"""What adapters changed in whole models: against dense weights that PEFT merges, and for several adapters at once."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel

from dvora.tools.analysis import analyze, layer_type
from dvora.tools.analysis.measures import change
from dvora.tools.analysis.report import log_limits
from tests.peft import tiny
from tests.tools.doctor.models import METHODS, adapted, small_model

LAYERS = ["lin0", "lin1", "lin2"]


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_moved_as_a_merge_moves_them(method: str) -> None:
    model = small_model(method)
    found = analyze(model).changes[0]
    assert [each.layer for each in found] == LAYERS
    before = {name: tiny.mlp().get_submodule(name).weight.detach().double() for name in LAYERS}
    merged = model.merge_and_unload()
    for each in found:
        expected = change(before[each.layer], merged.get_submodule(each.layer).weight.detach().double())
        assert each.change == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert each.shape == tuple(before[each.layer].shape)


def test_the_magnitude_alone_turns_nothing() -> None:
    found = analyze(small_model("magnitude")).changes[0]
    assert max(each.change.degrees for each in found) < 1e-5
    assert min(each.change.magnitude for each in found) > 1e-3


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_an_update_has_the_rank_of_its_method(method: str) -> None:
    for each in analyze(small_model(method)).changes[0]:
        rank = {"lora": 4, "vera": 8}[method]
        assert sum(value > 1e-6 for value in each.spectrum.values) <= rank
        assert 1 <= each.spectrum.effective_rank <= rank


def with_two(method: str) -> PeftModel:
    model = small_model(method)
    model.add_adapter("other", METHODS[method](target_modules=LAYERS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                model.get_parameter(name.replace(".default", ".other")).copy_(parameter)
    return model


@pytest.mark.parametrize("method", ["dvora", "lora", "dora", "vera"])
def test_equal_adapters_are_alike_and_active_ones_stay_active(method: str) -> None:
    model = with_two(method)
    found = analyze(model)
    assert found.adapters == ("default", "other")
    assert found.similarity[0] == pytest.approx((1, 1))
    assert set(found.layer_similarity) == set(LAYERS)
    assert found.changes[0][0].change == pytest.approx(found.changes[1][0].change)
    assert model.active_adapters == ["default"]
    assert analyze(model, ["other"]).adapters == ("other",)


def test_opposite_adapters_are_reported() -> None:
    model = with_two("lora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                parameter.neg_()
    assert analyze(model).similarity[0][1] == pytest.approx(-1)


def test_an_untrained_adapter_has_changed_nothing() -> None:
    found = analyze(small_model(moved=0.0))
    assert max(each.change.size for each in found.changes[0]) < 1e-6
    assert found.correlation() is None or -1 <= found.correlation() <= 1


def test_the_correlation_is_that_of_magnitude_and_direction() -> None:
    found = analyze(adapted(tiny.bert(), "dvora", "all-linear"))
    points = torch.tensor([(each.change.magnitude, each.change.direction) for each in found.changes[0]])
    assert found.correlation() == pytest.approx(float(torch.corrcoef(points.T)[0, 1]))


def test_the_analysis_is_json() -> None:
    content = json.loads(json.dumps(analyze(small_model()).to_dict()))
    assert [layer["layer"] for layer in content["adapters"][0]["layers"]] == LAYERS
    assert content["similarity"] == [[1.0]]


def test_what_cannot_be_analyzed_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a PeftModel, got MLP"):
        analyze(tiny.mlp())  # type: ignore[arg-type]
    model = small_model()
    with pytest.raises(ValueError, match="no adapter 'else', only default"):
        analyze(model, ["else"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge it first"):
        analyze(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert.encoder.layer.0.attention.output.dense", "attention.output.dense"),
        ("bert.encoder.layer.11.output.dense", "output.dense"),
        ("model.layers.3.mlp.experts.7.up_proj", "up_proj"),
        ("head.classifier", "classifier"),
        ("blocks.0", "0"),
    ],
)
def test_layers_of_one_type_share_a_name(name: str, expected: str) -> None:
    assert layer_type(name) == expected


def test_an_axis_has_no_empty_decades() -> None:
    assert log_limits(np.array([0.0, 0.2, 0.1])) == pytest.approx((0.1 / 1.5, 0.3))
    assert log_limits(np.array([1.0, 1e-16])) == pytest.approx((1e-6 / 1.5, 1.5))
    assert log_limits(np.zeros(3)) is None
