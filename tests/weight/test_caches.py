"""No pass is stale: row factors and shared projections are computed again once anything they depend on changes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dvora import DVoRAAdapter
from dvora.weight.factors import PassFactors, factors_of
from dvora.weight.linear import Update, adapted_linear
from tests.cached_layers import (
    CHANGES,
    CHANGES_OF_INPUTS,
    CHANGES_OF_LAYERS,
    OUTS,
    SAME_VALUES,
    UNCOUNTED,
    Siblings,
    Subject,
    in_peft,
    other,
    plain,
)
from tests.cases import COPIES, fresh_copy, randn, trained_layer

MODES = [torch.no_grad, torch.enable_grad, torch.inference_mode]
both = pytest.mark.parametrize("make", [plain, in_peft])


def factors(subject: Subject) -> PassFactors | None:
    """Those that the layer keeps from evaluation."""
    kept = subject.adapted.kept.evaluated
    return None if kept is None else kept.factors


def follows(subject: Subject, change: str, mode: Callable[[], AbstractContextManager[object]]) -> None:
    """Whether layers made anew agree about siblings after a change in the middle of a pass, and about the next pass."""
    with mode():
        before = subject.outputs()
        first = subject.outputs(0, 1)  # its graph, if it has one, keeps the projection
    with torch.no_grad() if subject.x.requires_grad else nullcontext():
        CHANGES[change](subject)
    with mode():
        siblings, found = subject.outputs(1, 3), subject.outputs()
    expected = subject.anew().evaluated()
    assert torch.equal(siblings, expected[..., OUTS[0] :])
    assert torch.equal(found, expected)
    assert torch.equal(found, before) == (change in SAME_VALUES)
    assert torch.equal(first, before[..., : OUTS[0]])


@pytest.mark.parametrize("change", CHANGES)
def test_no_pass_is_stale(change: str) -> None:
    for mode in MODES:
        follows(plain(), change, mode)
    follows(in_peft(), change, torch.no_grad)


# PyTorch resizes no tensor that requires a gradient.
@pytest.mark.parametrize("change", sorted(CHANGES_OF_INPUTS.keys() - {"resize_"}))
def test_inputs_of_a_graph_whose_values_are_not_compared_are_followed_too(change: str) -> None:
    subject = plain()
    subject.x.requires_grad_()
    if change not in UNCOUNTED:
        follows(subject, change, torch.enable_grad)
        return
    before = subject.outputs()
    with torch.no_grad():
        CHANGES[change](subject)
    # A layer that asks again is in another pass.
    assert torch.equal(subject.outputs(), subject.anew().evaluated())
    assert before.requires_grad


def test_layers_made_anew_are_those_made_from_their_values() -> None:
    subject = plain()
    for layer, made in zip(subject.layers, subject.anew().layers, strict=True):
        assert torch.equal(made(subject.x), fresh_copy(layer).eval()(subject.x))
    assert torch.equal(in_peft().evaluated(), subject.evaluated())


def test_factors_are_computed_once_for_every_way_of_evaluating() -> None:
    for subject in (plain(), in_peft()):
        subject.evaluated()
        kept = factors(subject)
        assert kept is not None
        subject.evaluated()
        with torch.inference_mode():
            subject.outputs()
        subject.model.train()
        subject.evaluated()
        assert factors(subject) is kept


def test_factors_that_are_kept_are_the_ones_that_are_used() -> None:
    subject = plain()
    subject.evaluated()
    (trained, constant, _), prepared = factors(subject)
    (dtype,) = prepared
    prepared.clear()
    trained.zero_(), constant[0].fill_(1), constant[1].zero_()
    with torch.no_grad():
        assert torch.allclose(subject.layers[1](subject.x), subject.base(subject.x))
        prepared[dtype] = lambda _, onto: onto.add_(7)
        assert torch.allclose(subject.layers[1](subject.x), subject.base(subject.x) + 7)


@both
def test_a_pass_that_trains_anything_keeps_no_factors(make: Callable[[], Subject]) -> None:
    for index in range(4):
        subject = make()
        trained = [*subject.vectors, subject.base.weight]
        for tensor in trained:
            tensor.requires_grad_(tensor is trained[index])
        subject.evaluated()
        for training in (True, False):
            subject.model.train(training)
            subject.outputs().square().sum().backward()
            assert factors(subject) is None
        expected = subject.anew()
        expected.model.zero_grad()
        expected.outputs().square().sum().backward()
        gradient = [*expected.vectors, expected.base.weight][index].grad
        torch.testing.assert_close(trained[index].grad, 2 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", MODES)
def test_frozen_vectors_pass_gradients_on_to_the_inputs(first: Callable[[], object]) -> None:
    subject = plain()
    subject.model.requires_grad_(False)
    with first():
        subject.outputs()
    kept = factors(subject)
    gradients = []
    for each in (subject, subject.anew()):
        each.x.requires_grad_()
        each.outputs().square().sum().backward()
        gradients.append(each.x.grad)
    torch.testing.assert_close(*gradients)
    assert factors(subject) is kept is not None


def test_an_evaluation_in_inference_mode_may_be_followed_by_training() -> None:
    subject = plain()
    with torch.inference_mode():
        subject.outputs()
    subject.model.requires_grad_(False)
    nn.Linear(22, 2)(subject.outputs()).sum().backward()
    subject.model.requires_grad_(True)
    subject.train()


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_alternating_training_and_evaluation_are_never_stale(way: dict[str, bool]) -> None:
    subject = plain(freeze_base_layer=False)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=0.05, **way)
    for between in (True, False, True, False):
        subject.model.train()
        subject.outputs().square().sum().backward()
        if between:
            subject.evaluated()
        optimizer.step()
        subject.model.eval()
        expected = subject.anew().evaluated()
        assert torch.equal(subject.evaluated(), expected)
        assert torch.equal(subject.evaluated(), expected)


def test_a_refresh_drops_the_factors_of_a_weight_whose_change_torch_does_not_count() -> None:
    subject = plain()
    subject.evaluated()
    subject.base.weight.data.mul_(torch.linspace(1, 2, 6))
    subject.adapted.refresh(subject.base.weight)
    assert torch.equal(subject.evaluated(), subject.anew().evaluated())


def test_the_plain_layers_own_steps_are_followed() -> None:
    subject = plain()
    layer = subject.layers[1]
    subject.evaluated()
    layer.set_parameters(other(layer.get_parameters()))
    assert torch.equal(subject.evaluated(), subject.anew().evaluated())
    layer.train()
    layer.backward(layer(subject.x).detach())
    layer.eval()
    subject.evaluated()
    layer.update_parameters(0.01)
    assert torch.equal(subject.evaluated(), subject.anew().evaluated())


@both
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_caches_of_its_own(copied: Callable[[nn.Module], nn.Module], make: Callable[[], Subject]) -> None:
    subject = make()
    before = subject.evaluated()
    made = Subject(copied(subject.model))
    assert factors(made) is None
    assert torch.equal(made.evaluated(), before)
    CHANGES_OF_LAYERS["trained in training mode"](made)
    assert torch.equal(subject.evaluated(), before)
    assert torch.equal(made.evaluated(), made.anew().evaluated())


def other_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: other(value) for name, value in model.named_parameters() if value.requires_grad}


def test_functional_call_with_other_vectors_is_followed_there_and_back() -> None:
    subject = plain()
    before, values = subject.evaluated(), other_values(subject.model)
    with torch.no_grad():
        found = functional_call(subject.model, values, subject.x)
    assert torch.equal(subject.evaluated(), before)
    subject.model.load_state_dict(values, strict=False)
    assert torch.equal(found, subject.anew().evaluated())


def test_vmap_over_stacked_vectors_neither_uses_nor_leaves_anything() -> None:
    subject = plain()
    before, values = subject.evaluated(), other_values(subject.model)
    own = {name: value.detach() for name, value in subject.model.named_parameters() if value.requires_grad}
    stacked = {name: torch.stack([own[name], values[name]]) for name in values}
    with torch.no_grad():
        found = vmap(lambda each: functional_call(subject.model, each, subject.x))(stacked)
    torch.testing.assert_close(found[0], before)
    assert torch.equal(subject.evaluated(), before)
    subject.model.load_state_dict(values, strict=False)
    torch.testing.assert_close(found[1], subject.anew().evaluated())


@pytest.mark.usefixtures("compiler")
def test_compiled_layers_follow_changes_and_leave_nothing() -> None:
    subject = plain()
    compiled = torch.compile(subject.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(subject.x), subject.evaluated())
        for change in ("magnitude", "lambda_b", "lambda_d", "add_"):
            CHANGES[change](subject)
            expected = subject.anew().evaluated()
            torch.testing.assert_close(compiled(subject.x), expected)
            torch.testing.assert_close(subject.evaluated(), expected)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_evaluate_one_layer_with_vectors_of_their_own() -> None:
    layer, x = trained_layer(6, 5, 3).eval(), randn(4, 6, seed=8)

    def evaluate(values: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [called(layer, values, x) for _ in range(30)]

    sets = [{n: other(v, seed) for n, v in layer.vectors._asdict().items()} for seed in range(6)]
    expected = [called(fresh_copy(layer).eval(), values, x) for values in sets]
    with ThreadPoolExecutor(6) as pool:
        for found, y in zip(pool.map(evaluate, sets), expected, strict=True):
            assert all(torch.equal(each, y) for each in found)


@torch.no_grad()
def called(layer: DVoRAAdapter, values: dict[str, Tensor], x: Tensor) -> Tensor:
    """The outputs with other vectors; `functional_call` itself changes the layer, so threads cannot use it."""
    vectors = layer.vectors._replace(**values)
    found = factors_of(layer.adapted, vectors, layer.base_layer.weight)
    base, update = layer.base_layer, Update(layer.adapted, vectors, found, layer.adapted.matrices)
    return adapted_linear(update, base(x), x, base.bias)


def test_layers_made_in_inference_mode_are_followed() -> None:
    with torch.inference_mode():
        layer, x = trained_layer(6, 5, 3).eval(), randn(4, 6, seed=8)
        layer(x)
        layer.base_layer.weight.mul_(randn(5, 6, seed=9))
        assert torch.equal(layer(x), fresh_copy(layer)(x))


def test_a_weight_whose_data_is_its_own_transpose_is_followed() -> None:
    layer, x = trained_layer(6, 6, 3).eval(), randn(4, 6, seed=8)
    with torch.no_grad():
        layer(x)
        layer.base_layer.weight.data = layer.base_layer.weight.data.T
        torch.testing.assert_close(layer(x), fresh_copy(layer)(x))


def test_inputs_of_inference_mode_are_projected_again_since_their_changes_are_not_counted() -> None:
    subject = plain()
    with torch.inference_mode():
        subject.x = randn(6, 6, seed=8)
        subject.outputs(0, 1)
        subject.x.mul_(2)
        assert torch.equal(subject.outputs(1), subject.anew().outputs(1))


def replaced(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * args[0],)


def changed(_: object, args: tuple[Tensor, ...]) -> None:
    args[0].add_(1)


@pytest.mark.parametrize("hook", [replaced, changed])
def test_hooks_of_one_sibling_may_change_its_inputs_and_the_next_ones(hook: Callable[..., object]) -> None:
    subject, apart = plain(), plain().anew()
    for each in (subject, apart):
        each.layers[1].register_forward_pre_hook(hook)
        each.layers[0].register_forward_hook(lambda _, args, __: args[0].mul_(2).shape and None)
    assert torch.equal(subject.evaluated(), apart.evaluated())
    assert isinstance(subject.model, Siblings)
