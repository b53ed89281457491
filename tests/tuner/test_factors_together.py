"""The factors of whole models, made together from the second pass on: the layers' own, and the dense reference's."""

from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from dvora import DVoRAConfig
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.weight import linear
from tests.tuner.dense_weights import DenseModel, gradients_by_parameter
from tests.tuner.layer_cases import CASES
from tests.tuner.models_compared import worst_difference
from tests.tuner.subjects import Subject, second
from tests.tuner.tiny import LAYERS, MODELS, dvora_layers, forward, gradients, inputs, loss, train_vectors
from tests.tuner.towers import (
    Results,
    adapted,
    alone,
    calls,
    evaluated,
    inner,
    layer_of,
    loss_of,
    tower,
    trained,
)

__all__ = ["calls"]
SCALINGS = {"lin1": 1.0, "lin2": 1 / 5, "lin3": 2 / 3}
"""alpha / r of "patterns"."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SETTINGS: dict[str, dict[str, object]] = {
    "defaults": {},
    "weight": {"direction": "weight"},
    "detach_norm": {"detach_norm": True},
    "alpha": {"alpha": 7.5},
    "patterns": {"rank_pattern": {"lin1": 5, "lin2": 5}, "alpha_pattern": {"lin3": 2.0, "lin2": 1.0}},
    "strength": {"strength": 0.4},
    "strengths": {"strength": {"lin1": 0.4, "lin2": -1.5, "lin0|lin3": 1.0}},
    "biases": {"bias": "dvora_only"},
    "some vectors": {"train": ["lambda_b", "lambda_d"]},
    "one vector": {"train": ["magnitude"]},
    "magnitudes": {"target_modules": ["lin0", "lin2"], "magnitude_modules": ["lin1", "lin3"]},
    "a rank above the sizes": {"r": 20},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_pass_gives_what_layers_give_by_themselves_and_the_dense_method(
    settings: str, distribution: str, dtype: torch.dtype
) -> None:
    model = adapted(projection_init=distribution, **SETTINGS[settings]).to(dtype)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    expected = trained(alone(model), x)
    dense = DenseModel(tower(), model)
    for name, scaling in SCALINGS.items() if settings == "patterns" else ():
        dense.weights[f"{name}.weight"].adapters[0].scaling = scaling
    y = dense(x)
    loss_of(y).backward()
    for _ in range(3):
        found = trained(model, x)
        assert found.differ(expected) < TOLERANCE[dtype]
        assert worst_difference(found["outputs"], y) < TOLERANCE[dtype]
        for name, gradient in gradients_by_parameter(model).items():
            assert worst_difference(gradient, dense.gradients()[name]) < 2 * TOLERANCE[dtype], name
        assert worst_difference(evaluated(model, x), y) < TOLERANCE[dtype]


@pytest.mark.parametrize("layer", CASES)
def test_every_layer_type_trains_as_the_dense_method_in_later_passes_too(layer: str) -> None:
    subject = Subject(layer, "float64")
    model = subject.adapted()
    for _ in range(3):
        model.zero_grad()
        assert subject.gradients_agree(model)


@pytest.mark.parametrize("layer", sorted({"Linear", "Conv2d, groups, reflect", "Embedding, padding", "Conv1d"}))
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_two_active_adapters_of_every_kind_of_layer(layer: str, distribution: str) -> None:
    subject = Subject(layer, "float64")
    model = subject.adapted(projection_init=distribution)
    model.add_adapter("second", subject.config(r=7, projection_seed=3, direction="weight", detach_norm=True))
    train_vectors(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    expected = Results(gradients_of(alone(model), subject))
    dense = subject.dense(model, ("default", "second"))
    for _ in range(3):
        assert Results(gradients_of(model, subject)).differ(expected) < 1e-11
        with torch.no_grad():
            assert subject.close(model(subject.x()), dense(subject.x()))


def gradients_of(model: PeftModel, subject: Subject) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model(subject.x())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_whole_models_of_mixed_shapes(name: str, distribution: str) -> None:
    target = LAYERS[name]
    config = DVoRAConfig(r=6, target_modules=target, projection_init=distribution, rank_pattern={target[0]: 4})
    model = get_peft_model(MODELS[name]().double(), config)
    train_vectors(model)
    model.add_adapter("second", DVoRAConfig(r=6, target_modules=target[1:], projection_init=distribution))
    train_vectors(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    expected = gradients(alone(model))
    for _ in range(3):
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert max(worst_difference(found[key], expected[key]) for key in expected) < 1e-11


def test_the_second_pass_makes_them_once_a_shape(calls: Counter[int]) -> None:
    model = adapted(rank_pattern={"lin1": 5, "lin2": 5})
    trained(model)
    assert calls == {1: 4}
    calls.clear()
    step(model)
    trained(model)
    assert calls == {2: 2}


def step(model: torch.nn.Module) -> None:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, {4: 1}),
        ({"alpha_pattern": {"lin0": 2.0}}, {3: 1, 1: 1}),
        ({"target_modules": ["lin0", "lin2"], "magnitude_modules": ["lin1", "lin3"]}, {2: 1, 1: 2}),
        ({"target_modules": ["lin0", "lin2"]}, {2: 1}),
        ({"strength": {"lin0|lin1": 0.3, "lin2|lin3": 1.0}}, {4: 1}),
    ],
)
def test_one_stack_has_the_layers_of_one_shape_and_setting(
    settings: dict[str, object], sizes: dict[int, int], calls: Counter[int]
) -> None:
    model = adapted(**settings)
    trained(model)
    calls.clear()
    step(model)
    trained(model)
    assert calls == sizes


def test_two_active_adapters_of_one_setting_are_one_stack(calls: Counter[int]) -> None:
    model = adapted(("default", "second"))
    model.base_model.set_adapter(["default", "second"])
    trained(model)
    calls.clear()
    step(model)
    trained(model)
    assert calls == {8: 1}


def test_evaluation_makes_none_after_the_first_pass(calls: Counter[int]) -> None:
    model = adapted()
    expected = evaluated(model)
    assert calls == {1: 4}
    for _ in range(3):
        assert torch.equal(evaluated(model), expected)
    assert calls == {1: 4}


def test_a_layer_that_a_pass_calls_twice_uses_one_set_of_factors(calls: Counter[int]) -> None:
    model = adapted()
    inner(model).middle = layer_of(model, "lin0")
    expected = trained(alone(model))
    for _ in range(3):
        step(model)
        calls.clear()
        expected = trained(alone(model))
        calls.clear()
        assert trained(model).differ(expected) < 1e-5
    assert calls == {4: 1}


def test_a_layer_that_trains_beside_frozen_ones_is_alone_in_its_stack(calls: Counter[int]) -> None:
    model = adapted()
    for name in ("lin0", "lin1", "lin3"):
        for vector in layer_of(model, name).vectors("default"):
            vector.requires_grad_(False)
    for _ in range(3):
        calls.clear()
        expected = trained(alone(model))
        calls.clear()
        assert trained(model).differ(expected) < 1e-5
        step(model)
    assert calls == {1: 1}


def test_layers_whose_base_is_trained_make_their_own(calls: Counter[int]) -> None:
    model = adapted()
    layer_of(model).base_layer.weight.requires_grad_()
    expected = trained(alone(model))
    for _ in range(3):
        calls.clear()
        assert trained(model).differ(expected) < 1e-5
    assert max(calls, default=0) <= 3
    assert "base_model.model.lin3.base_layer.weight" in expected


def test_injected_adapters_without_a_peft_model_are_made_together(calls: Counter[int]) -> None:
    model = inject_adapter_in_model(DVoRAConfig(r=3, target_modules=["lin0", "lin1", "lin2", "lin3"]), tower())
    train_vectors(model)
    expected = trained(alone(model))
    trained(model)
    step(model)
    expected = trained(alone(model))
    calls.clear()
    assert trained(model).differ(expected) < 1e-5
    assert calls == {4: 1}


def test_generation_uses_them_without_the_tuners_forward(calls: Counter[int]) -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"])).eval()
    train_vectors(model)
    batch = inputs(model)
    expected = alone(model).generate(**batch, max_new_tokens=6, do_sample=False)
    calls.clear()
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)
    layers = len(list(dvora_layers(model)))
    assert calls == {1: layers}  # in the first of six passes
    train_vectors(model, seed=3)
    other = alone(model).generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), other)


def test_second_derivatives_go_through_factors_that_were_made_together() -> None:
    model = adapted().double()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def second_derivative(of: PeftModel) -> list[torch.Tensor]:
        own = [p for p in of.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss_of(of(x)), own, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), own))

    expected = second_derivative(alone(model))
    for _ in range(3):
        for found, own in zip(second_derivative(model), expected, strict=True):
            assert worst_difference(found, own) < 1e-10
    assert len(parameters) == 12


@pytest.mark.parametrize("batched", [True, False])
def test_a_graph_of_gradients_reaches_every_layer_once(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, reached = 9, []
    config = DVoRAConfig(r=3, target_modules=[str(i) for i in range(depth)])
    model = get_peft_model(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(depth))), config)
    gradients_of_layer = linear._differentiable_gradients

    def counting(*args: object) -> object:
        reached.append(args)
        return gradients_of_layer(*args)

    monkeypatch.setattr(linear, "_differentiable_gradients", counting)
    own = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        reached.clear()
        y = model(torch.ones(2, 4))
        directions = torch.ones(2, *y.shape) if batched else torch.ones_like(y)
        torch.autograd.grad(y, own, directions, is_grads_batched=batched, create_graph=not batched)
        assert len(reached) == depth


def test_batched_gradients_go_through_factors_that_were_made_together() -> None:
    model = adapted().double()
    x = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = [p for p in model.parameters() if p.requires_grad]
    directions = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        y = model(x)
        found = torch.autograd.grad(y, own, directions, is_grads_batched=True, retain_graph=True)
        for index, direction in enumerate(directions):
            expected = torch.autograd.grad(y, own, direction, retain_graph=True)
            assert all(worst_difference(f[index], e) < 1e-11 for f, e in zip(found, expected, strict=True))


def test_models_that_share_layers_are_two_models() -> None:
    first, other = adapted(), adapted()
    inner(other).lin0 = inner(first).lin0
    for _ in range(3):
        for model in (first, other):
            assert trained(model).differ(trained(alone(model))) < 1e-5
            step(model)


def test_a_second_adapter_of_the_same_layer_trains_with_the_first_frozen() -> None:
    subject = Subject("Linear", "float64")
    model = subject.adapted()
    second(model, subject)
    model.base_model.set_adapter(["default", "second"])
    for vector in (p for n, p in model.named_parameters() if n.endswith(".default")):
        vector.requires_grad_(False)
    expected = Results(gradients_of(alone(model), subject))
    for _ in range(3):
        assert Results(gradients_of(model, subject)).differ(expected) < 1e-11
    assert forward is not loss
