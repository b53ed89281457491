"""Gain and scale of an evaluated layer are made once, and again as soon as anything that they depend on changes."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dvora import DVoRAAdapter
from dvora.weight.linear import combined
from tests.cases import fresh_copy, randn, trained_layer
from tests.weight.evaluated_cases import CHANGES, IN, OUT, RANK, Evaluated, other, plain, write_one


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_follows_a_change(change: str) -> None:
    case = plain()
    before = case.outputs()
    CHANGES[change](case)
    found = case.outputs()
    assert not torch.equal(found, before)
    assert torch.equal(found, case.fresh().outputs())


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_in_inference_mode_follows_a_change(change: str) -> None:
    case = plain()
    with torch.inference_mode():
        case.model(case.x())
    CHANGES[change](case)
    with torch.inference_mode():
        found = case.model(case.x())
    assert torch.equal(found, case.fresh().outputs())


def test_factors_are_made_once() -> None:
    case = plain()
    case.outputs()
    kept = case.factors()
    assert kept is not None
    case.outputs()
    with torch.inference_mode():
        case.model(case.x())
    case.model.train()
    case.outputs()
    assert case.factors() is kept


def test_factors_that_are_kept_are_the_ones_that_are_used() -> None:
    case = plain()
    before = case.outputs()
    gain_minus_one, scale, gain, _ = case.factors()
    gain_minus_one.zero_()
    scale.zero_()
    gain.fill_(1)
    x, base = case.x(), case.base
    assert torch.allclose(case.outputs(), base(x))
    assert not torch.allclose(before, base(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_pass_that_trains_keeps_none(training: bool) -> None:
    case = plain()
    case.outputs()
    case.model.train(training)
    for _ in range(2):
        case.model(case.x()).sum().backward()
        assert case.factors() is None
    assert case.vectors[0].grad is not None


@pytest.mark.parametrize("trained", range(3), ids=["magnitude", "lambda_b", "lambda_d"])
def test_a_pass_that_trains_one_vector_keeps_none(trained: int) -> None:
    case = plain()
    for index, vector in enumerate(case.vectors):
        vector.requires_grad_(index == trained)
    case.outputs()
    case.model(case.x()).square().sum().backward()
    assert case.factors() is None
    grad = case.vectors[trained].grad
    expected = case.fresh()
    expected.model(case.x()).square().sum().backward()
    assert torch.equal(grad, expected.vectors[trained].grad)


def test_a_pass_that_trains_the_base_keeps_none() -> None:
    case = Evaluated(trained_layer(IN, OUT, RANK, freeze_base_layer=False).eval())
    for vector in case.vectors:
        vector.requires_grad_(False)
    case.outputs()
    case.model(case.x()).square().sum().backward()
    assert case.factors() is None
    expected = fresh_copy(case.model)
    expected(case.x()).square().sum().backward()
    assert torch.equal(case.base.weight.grad, expected.base_layer.weight.grad)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_vectors_pass_gradients_on_to_the_inputs(first: Callable[[], object]) -> None:
    case = plain()
    case.model.requires_grad_(False)
    with first():
        case.model(case.x())
    kept = case.factors()
    x = case.x().requires_grad_()
    case.model(x).square().sum().backward()
    assert case.factors() is kept is not None
    fresh_x = case.x().requires_grad_()
    case.fresh().model(fresh_x).square().sum().backward()
    assert torch.equal(x.grad, fresh_x.grad)


def test_an_evaluation_in_inference_mode_may_be_followed_by_training() -> None:
    case = plain()
    with torch.inference_mode():
        case.model(case.x())
    case.model.requires_grad_(False)
    head = nn.Linear(OUT, 2)
    head(case.model(case.x())).sum().backward()
    case.model.requires_grad_(True)
    case.model(case.x()).square().sum().backward()
    assert case.vectors[0].grad is not None


def test_alternating_training_and_evaluation_are_never_stale() -> None:
    case = plain()
    optimizer = torch.optim.AdamW(case.vectors, lr=0.05)
    for step in range(4):
        case.model.train()
        case.model(case.x()).square().sum().backward()
        optimizer.step()
        case.model.eval()
        assert torch.equal(case.outputs(), case.fresh().outputs()), step
        assert torch.equal(case.outputs(), case.fresh().outputs()), step


@pytest.mark.parametrize("kind", ["for each", "foreach", "fused"])
@pytest.mark.parametrize("between", [True, False], ids=["evaluated between", "at the end"])
def test_a_base_trained_by_an_optimizer_is_followed(kind: str, between: bool) -> None:
    case = Evaluated(trained_layer(IN, OUT, RANK, freeze_base_layer=False).eval())
    settings = {"foreach": False} if kind == "for each" else {kind: True}
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.1, **settings)
    for _ in range(3):
        case.model(case.x()).square().sum().backward()
        if between:
            case.outputs()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(case.outputs(), fresh_copy(case.model)(case.x()))


def test_a_refresh_drops_the_factors_of_a_weight_whose_change_torch_does_not_count() -> None:
    case = plain()
    case.outputs()
    case.base.weight.data.mul_(torch.linspace(1, 2, IN))
    case.adapted.refresh(case.base.weight)
    assert torch.equal(case.outputs(), case.fresh().outputs())


def test_set_parameters_and_update_parameters_are_followed() -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    case = Evaluated(layer)
    case.outputs()
    layer.set_parameters(other(layer.get_parameters()))
    assert torch.equal(case.outputs(), case.fresh().outputs())
    layer.train()
    layer.backward(layer(case.x()).detach())
    layer.eval()
    case.outputs()
    layer.update_parameters(0.01)
    assert torch.equal(case.outputs(), case.fresh().outputs())


def test_a_copy_that_is_trained_leaves_the_layer_alone_and_is_not_stale() -> None:
    case = plain()
    before = case.outputs()
    copied = Evaluated(copy.deepcopy(case.model))
    copied.outputs()
    write_one(0)(copied)
    assert torch.equal(case.outputs(), before)
    assert torch.equal(copied.outputs(), copied.fresh().outputs())
    assert copied.adapted._last is not case.adapted._last


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole])
def test_a_layer_that_was_evaluated_can_be_copied(copied: Callable[[nn.Module], nn.Module]) -> None:
    case = plain()
    before = case.outputs()
    made = Evaluated(copied(case.model))
    assert made.factors() is None
    assert torch.equal(made.outputs(), before)


def test_functional_call_with_other_vectors_is_followed_there_and_back() -> None:
    case = plain()
    before = case.outputs()
    values = {name: other(value) for name, value in case.model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        found = functional_call(case.model, values, case.x())
        assert torch.equal(case.outputs(), before)
    case.model.load_state_dict(values, strict=False)
    assert torch.equal(found, case.fresh().outputs())


def test_vmap_over_stacked_vectors_neither_uses_nor_leaves_factors() -> None:
    case = plain()
    x, before, vectors = case.x(), case.outputs(), {n: v.detach() for n, v in case.model.vectors._asdict().items()}
    stacked = {name: torch.stack([value, other(value)]) for name, value in vectors.items()}
    with torch.no_grad():
        found = vmap(lambda values: functional_call(case.model, values, x))(stacked)
    torch.testing.assert_close(found[0], before)
    assert torch.equal(case.outputs(), before)
    case.model.load_state_dict({name: other(value) for name, value in vectors.items()}, strict=False)
    torch.testing.assert_close(found[1], case.fresh().outputs())


def test_a_compiled_layer_follows_vectors_and_leaves_no_factors() -> None:
    torch.compiler.reset()
    case = plain()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with torch.no_grad():
            torch.testing.assert_close(compiled(case.x()), case.outputs())
            for index in range(3):
                write_one(index)(case)
                torch.testing.assert_close(compiled(case.x()), case.fresh().outputs())
                torch.testing.assert_close(case.outputs(), case.fresh().outputs())
    torch.compiler.reset()


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_evaluate_one_layer_with_vectors_of_their_own() -> None:
    layer = trained_layer(IN, OUT, RANK).eval()
    x = randn(4, IN, seed=8)

    def evaluate(values: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [_called(layer, values, x) for _ in range(30)]

    sets = [{n: other(v, seed) for n, v in layer.vectors._asdict().items()} for seed in range(6)]
    expected = [_called(fresh_copy(layer).eval(), values, x) for values in sets]
    with ThreadPoolExecutor(6) as pool:
        for found, y in zip(pool.map(evaluate, sets), expected, strict=True):
            assert all(torch.equal(each, y) for each in found)


@torch.no_grad()
def _called(layer: DVoRAAdapter, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The outputs with other vectors; `functional_call` itself changes the layer and cannot be used by threads."""
    vectors = layer.vectors._replace(**values)
    factors = layer.adapted.row_factors(vectors, layer.base_layer.weight)
    return combined(layer.adapted, layer.base_layer(x), x, vectors.lambda_d, factors, layer.base_layer.bias)
