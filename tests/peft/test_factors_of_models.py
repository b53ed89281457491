"""Factors of whole models, made for all layers of a shape at once: as by every layer alone, and as the dense method."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from dvora import DVoRAConfig
from dvora.functional import Vectors
from dvora.matrices.interface import DISTRIBUTIONS
from tests.peft.dense_weights import DenseModel, gradients_by_parameter
from tests.peft.models_compared import worst_difference
from tests.peft.subjects import Subject
from tests.peft.tiny import LAYERS, MODELS, gradients, inputs, train_vectors
from tests.peft.towers import Results, adapted, alone, evaluated, inner, layer_of, loss_of, tower, trained

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
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
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


@pytest.mark.parametrize("layer", ["Linear", "Conv2d, groups, reflect", "Embedding, padding", "Conv1d"])
def test_two_active_adapters_of_every_kind_of_layer(layer: str) -> None:
    subject = Subject(layer, "float64")
    model = subject.adapted()
    model.add_adapter("second", subject.config(r=7, projection_seed=3, direction="weight", detach_norm=True))
    train_vectors(model, "second", seed=1)
    model.base_model.set_adapter(["default", "second"])
    expected = gradients_of(alone(model), subject)
    dense = subject.dense(model, ("default", "second"))
    for _ in range(2):
        assert gradients_of(model, subject).differ(expected) < 1e-11
        with torch.no_grad():
            assert subject.close(model(subject.x()), dense(subject.x()))
    for vector in (p for n, p in model.named_parameters() if n.endswith(".default")):
        vector.requires_grad_(False)
    expected = gradients_of(alone(model), subject)
    for _ in range(2):
        assert gradients_of(model, subject).differ(expected) < 1e-11


def gradients_of(model: PeftModel, subject: Subject) -> Results:
    model.zero_grad()
    loss_of(model(subject.x())).backward()
    return Results({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


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


def step(model: torch.nn.Module) -> None:
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()


def call_twice(model: PeftModel) -> None:
    inner(model).middle = layer_of(model, "lin0")


def freeze_most(model: PeftModel) -> None:
    for name in ("lin0", "lin1", "lin3"):
        for vector in layer_of(model, name).vectors("default"):
            vector.requires_grad_(False)


def train_a_base(model: PeftModel) -> None:
    layer_of(model).base_layer.weight.requires_grad_()


@pytest.mark.parametrize("arrange", [call_twice, freeze_most, train_a_base])
def test_layers_that_are_called_twice_frozen_or_trained_with_their_base(arrange: object) -> None:
    model = adapted()
    arrange(model)
    for _ in range(3):
        assert trained(model).differ(trained(alone(model))) < 1e-5
        step(model)


def test_injected_adapters_need_no_peft_model() -> None:
    model = inject_adapter_in_model(DVoRAConfig(r=3, target_modules=["lin0", "lin1", "lin2", "lin3"]), tower())
    train_vectors(model)
    for _ in range(3):
        assert trained(model).differ(trained(alone(model))) < 1e-5
        step(model)


def test_models_that_share_layers_are_two_models() -> None:
    first, other = adapted(), adapted()
    inner(other).lin0 = inner(first).lin0
    for _ in range(3):
        for model in (first, other):
            assert trained(model).differ(trained(alone(model))) < 1e-5
            step(model)


def test_generation_without_the_tuners_forward() -> None:
    model = get_peft_model(MODELS["llama"](), DVoRAConfig(r=6, target_modules=LAYERS["llama"])).eval()
    batch = inputs(model)
    for seed in (0, 3):
        train_vectors(model, seed=seed)
        expected = alone(model).generate(**batch, max_new_tokens=6, do_sample=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("rows", [5, 40], ids=["thin", "folded"])
def test_second_derivatives_are_those_of_the_dense_method(rows: int) -> None:
    model = adapted().double()
    x = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = DenseModel(tower(), model)
    vectors = [getattr(w.adapters[0], name) for w in dense.weights.values() for name in Vectors._fields]
    expected = second_derivatives(dense(x), vectors)
    own = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        for found, value in zip(second_derivatives(model(x), own), expected, strict=True):
            assert worst_difference(found, value) < 1e-10


def second_derivatives(y: torch.Tensor, of: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    first = torch.autograd.grad(loss_of(y), of, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), of)


@pytest.mark.parametrize("rows", [2, 40], ids=["thin", "folded"])
def test_batched_gradients(rows: int) -> None:
    model = adapted().double()
    x = torch.randn(rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = [p for p in model.parameters() if p.requires_grad]
    directions = torch.randn(3, rows, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        y = model(x)
        found = torch.autograd.grad(y, own, directions, is_grads_batched=True, retain_graph=True)
        for index, direction in enumerate(directions):
            expected = torch.autograd.grad(y, own, direction, retain_graph=True)
            assert all(worst_difference(f[index], e) < 1e-11 for f, e in zip(found, expected, strict=True))
