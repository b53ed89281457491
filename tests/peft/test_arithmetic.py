"""Strength, interpolation and weighted sums of the adapters of a model."""

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.dense_weights import DenseModel
from tests.peft.layer_cases import CASES
from tests.peft.models_compared import assert_unchanged, snapshot, worst_difference
from tests.peft.operations_tried import Subject, second
from tests.peft.tiny import MODELS, dvora_layers, outputs, same_bits, train_vectors

MLP = ["lin0", "lin1", "lin2"]


def adapted(**settings: object) -> PeftModel:
    """The tiny MLP with adapters "default" and "second", as if trained."""
    model = get_peft_model(MODELS["mlp"](), DVoRAConfig(r=4, target_modules=MLP, **settings)).eval()
    model.add_adapter("second", DVoRAConfig(r=4, target_modules=MLP, **settings))
    for seed, name in enumerate(("default", "second")):
        train_vectors(model, name, seed)
    return model


def with_adapters(model: PeftModel, *names: str) -> Tensor:
    model.base_model.set_adapter(list(names))
    return outputs(model)


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
    model = adapted()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(error, match=message):
        model.set_strength(strength)
    assert_unchanged(model, before)
    assert same_bits(outputs(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter 'default' is merged into lin0; call unmerge_adapter first"):
        model.set_strength(0.5)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_interpolated_vectors_lie_between_those_of_the_ends(t: float) -> None:
    model = adapted()
    model.interpolate_adapters("default", "second", t, "between")
    for _, layer in dvora_layers(model):
        ends = zip(layer.vectors("default"), layer.vectors("second"), layer.vectors("between"), strict=True)
        assert all(torch.equal(torch.lerp(a, b, t), found) for a, b, found in ends)
    if t in (0.0, 1.0):
        assert same_bits(with_adapters(model, "between"), with_adapters(model, "second" if t else "default"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, "differ in rank: 4 and 5"),
        ({"alpha": 2.0}, "differ in scaling"),
        ({"direction": "weight"}, "differ in direction"),
        ({"projection_seed": 1}, "different projection_seed"),
        ({"projection_init": "kaiming_uniform"}, "different projection_init"),
        ({"target_modules": ["lin0"]}, "has only one of the adapters|has one of the adapters"),
        ({"bias": "dvora_only"}, "trains biases, tokens or whole modules"),
    ],
)
def test_adapters_that_differ_in_more_than_values_are_not_interpolated(
    settings: dict[str, object], message: str
) -> None:
    model = adapted()
    model.add_adapter("other", DVoRAConfig(**{"r": 4, "target_modules": MLP, **settings}))
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.interpolate_adapters("default", "other", 0.5, "between")
    assert_unchanged(model, before)
    assert "between" not in model.peft_config


@pytest.mark.parametrize("layer", [name for name in CASES if "weight_norm" not in name])
def test_a_weighted_sum_is_right_for_every_layer_type(layer: str) -> None:
    subject = Subject(layer, "float64")
    model, x = subject.adapted(), subject.x()
    second(model, subject)
    with torch.no_grad():
        for _, layer in dvora_layers(model):
            layer.vectors("second").lambda_d.copy_(-0.7 * layer.vectors("default").lambda_d)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum")
    model.set_strength(0.7, "default")
    model.set_strength(-0.4, "second")
    with torch.no_grad():
        model.base_model.set_adapter(["sum"])
        expected = DenseModel(subject.base(), model, ("default", "second"))(x)
        assert worst_difference(model(x), expected) < 1e-10


@pytest.mark.parametrize("direction", ["unit", "weight"])
def test_a_weighted_sum_is_right_for_zero_rows(direction: str) -> None:
    base = MODELS["mlp"]()
    with torch.no_grad():
        base.lin1.weight[2] = 0
    model = get_peft_model(base, DVoRAConfig(r=4, target_modules=MLP, direction=direction)).eval()
    train_vectors(model)
    model.add_weighted_adapter(["default"], [0.6], "sum")
    model.set_strength(0.6, "default")
    assert worst_difference(with_adapters(model, "sum"), with_adapters(model, "default")) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "second"], [1, 1], "sum"), "lin0: the adapters have different lambda_d.*Activate them together"),
        ((["default"], [1], "second"), "there is an adapter 'second' already"),
        ((["default", "third"], [1, 1], "sum"), r"\['third'\] given, the model has"),
        (([], [], "sum"), "none given"),
        ((["default"], [1, 2], "sum"), "weights has 2 entries for 1 adapters"),
        ((["default"], [float("inf")], "sum"), "strength must be finite"),
        ((["default"], [1], "sum", "svd"), "combination_type='svd' would only approximate"),
    ],
)
def test_a_sum_that_is_not_exact_is_refused_and_changes_nothing(arguments: tuple[object, ...], message: str) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert_unchanged(model, before)
    assert set(model.peft_config) == {"default", "second"}


def test_a_strength_by_name_is_that_of_the_layers_so_named_and_a_whole_name_comes_first() -> None:
    model = adapted()
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
    model = adapted().train()
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
