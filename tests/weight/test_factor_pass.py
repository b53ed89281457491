"""The hooks around a model's forward: when a pass begins and ends, what is made for it, what is left to the layers."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dvora import DVoRAAdapter
from dvora.method import norm
from dvora.ops.passes import Pass, current_pass, enter, leave
from dvora.weight.adapted_weight import AdaptedWeight
from dvora.weight.factor_pass import FactorPass, _join_constants, add_factor_pass, remove_factor_pass
from dvora.weight.factors import StackedEntry
from tests.cases import SHARED, fresh_copy, linear, randn, trained_layer

WIDTH, RANK = 6, 3


class Model(nn.Module):
    """Layers of one shape, one after another, with a place for more before each."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(trained_layer(WIDTH, WIDTH, RANK) for _ in range(count))
        self.seen: list[Pass | None] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.seen.append(current_pass())
            x = torch.tanh(layer(x))
        return x


def model_of(count: int = 3) -> Model:
    model = Model(count)
    add_factor_pass(model)
    return model


def inputs() -> Tensor:
    return randn(4, WIDTH, seed=8)


def step(model: nn.Module) -> None:
    model(inputs()).square().sum().backward()


def stacks(model: Model) -> list[object]:
    return [None if layer.adapted.kept.stacked is None else layer.adapted.kept.stacked.stack for layer in model.layers]


# Passes.


def test_a_pass_is_current_from_its_beginning_to_its_end_in_its_thread() -> None:
    owner, running, seen = object(), Pass(), []
    assert current_pass() is None
    enter(owner, running)
    assert current_pass() is running
    thread = threading.Thread(target=lambda: seen.append(current_pass()))
    thread.start()
    thread.join()
    assert seen == [None]
    leave(owner)
    assert current_pass() is None
    leave(owner)


def test_a_pass_within_a_pass_ends_first_and_those_that_were_interrupted_end_with_it() -> None:
    outer, inner, interrupted = object(), object(), object()
    first, second = Pass(), Pass()
    enter(outer, first)
    enter(inner, second)
    enter(interrupted, Pass())
    leave(inner)
    assert current_pass() is first
    enter(interrupted, Pass())
    leave(outer)
    assert current_pass() is None


def test_an_owner_ends_all_of_its_passes() -> None:
    owner, other, second = object(), object(), Pass()
    enter(owner, Pass())
    enter(other, Pass())
    enter(owner, second)
    assert current_pass() is second
    leave(owner)
    assert current_pass() is None


def test_every_forward_is_a_pass_of_its_own() -> None:
    model = model_of()
    for _ in range(2):
        model(inputs())
    first, second = set(model.seen[:3]), set(model.seen[3:])
    assert len(first) == len(second) == 1
    assert first != second
    assert None not in first | second
    assert current_pass() is None


def test_a_layer_by_itself_is_in_no_pass() -> None:
    model, seen = model_of(), []
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append(current_pass()))
    model.layers[0](inputs())
    assert seen == [None]


# Hooks.


def hooks(model: nn.Module) -> int:
    return len(model._forward_pre_hooks) + len(model._forward_hooks) + len(model._forward_hooks_always_called)


def test_hooks_are_added_once_and_taken_back_without_those_of_others() -> None:
    model = Model()
    model.register_forward_pre_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None, always_call=True)
    before = hooks(model)
    add_factor_pass(model)
    added = hooks(model)
    assert added == before + 3
    add_factor_pass(model)
    assert hooks(model) == added
    remove_factor_pass(model)
    assert hooks(model) == before
    remove_factor_pass(model)
    model(inputs())
    assert model.seen == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_hooks_and_a_memory_of_its_own(copied: Callable[[nn.Module], Model]) -> None:
    model = model_of()
    step(model)
    model.seen.clear()
    made = copied(model)
    assert hooks(made) == hooks(model)
    owners = [{h.__self__ for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())} for m in (model, made)]
    assert [len(own) for own in owners] == [1, 1]
    assert owners[0].isdisjoint(owners[1])
    (memory,) = owners[1]
    assert isinstance(memory, FactorPass)
    assert not memory._last
    step(made)
    step(made)
    assert len({id(stack) for stack in stacks(made)}) == 1
    add_factor_pass(made)
    assert hooks(made) == hooks(model)
    remove_factor_pass(made)
    assert hooks(made) == 0


# What is made.


def test_layers_of_a_shape_share_one_stack_from_the_second_pass_on() -> None:
    model = model_of()
    step(model)
    assert stacks(model) == [None] * 3
    step(model)
    (first, *others) = stacks(model)
    assert first is not None
    assert all(stack is first for stack in others)


def test_what_the_last_pass_did_not_use_is_not_made() -> None:
    model = model_of()
    step(model)
    step(model)
    unused = model.layers.pop(1)
    step(model)  # this one still expects it
    before = unused.adapted.kept.stacked
    step(model)
    assert unused.adapted.kept.stacked is before
    assert len(stacks(model)[0].packed) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: trained_layer(WIDTH, WIDTH, RANK, direction="weight"),
        lambda: trained_layer(WIDTH, WIDTH, RANK, detach_norm=True),
        lambda: trained_layer(WIDTH, WIDTH, RANK, alpha=7.0),
        lambda: trained_layer(WIDTH, WIDTH, RANK + 1),
        lambda: trained_layer(WIDTH, WIDTH, RANK, shared=copy.deepcopy(SHARED)),
        lambda: trained_layer(WIDTH, WIDTH, RANK, freeze_base_layer=False),
    ],
    ids=["direction", "detach_norm", "alpha", "rank", "matrices", "a trained base"],
)
def test_layers_that_differ_share_no_stack(other: Callable[[], DVoRAAdapter]) -> None:
    model = model_of()
    model.layers.append(other())
    step(model)
    step(model)
    assert len(stacks(model)[0].packed) == 3
    last = stacks(model)[3]
    assert last is None or len(last.packed) == 1
    alone = copy.deepcopy(model)
    remove_factor_pass(alone)
    for each in (model, alone):
        each.zero_grad()
        step(each)
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=name)


class Sharded(nn.Parameter):
    """As engines have them."""


@pytest.mark.parametrize(
    "vector",
    [
        lambda v: Sharded(v.detach().clone()),
        lambda v: nn.Parameter(v.detach().double()),
        lambda v: nn.Parameter(v.detach().bfloat16()),
    ],
    ids=["a subclass", "float64", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore:a DVoRA magnitude is in")
def test_unusual_vectors_get_their_gradients(vector: Callable[[Tensor], nn.Parameter]) -> None:
    for name in ("magnitude", "lambda_b", "lambda_d"):
        model = model_of()
        setattr(model.layers[1], name, vector(getattr(model.layers[1], name)))
        alone = copy.deepcopy(model)
        remove_factor_pass(alone)
        for _ in range(3):
            for each in (model, alone):
                each.zero_grad()
                step(each)
            for found, expected in zip(model.parameters(), alone.parameters(), strict=True):
                if expected.grad is not None:
                    assert found.grad.dtype == expected.grad.dtype
                    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-2, atol=1e-2)


def test_layers_that_are_gone_are_forgotten() -> None:
    model = model_of()
    step(model)
    gone = [weakref.ref(model.layers[1].adapted), weakref.ref(model.layers[1].magnitude)]
    del model.layers[1]
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    step(model)
    step(model)
    assert len(stacks(model)[0].packed) == 2


def test_a_pass_of_functional_call_trains_the_values_that_it_was_given() -> None:
    model = model_of()
    step(model)
    step(model)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: (1.2 * p.detach()).requires_grad_() for n, p in own.items()}
    found = torch.autograd.grad(functional_call(model, values, inputs()).sum(), list(values.values()))
    fresh = Model()
    fresh.load_state_dict({**model.state_dict(), **values})
    names = dict(fresh.named_parameters())
    expected = torch.autograd.grad(fresh(inputs()).sum(), [names[name] for name in values])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    model.zero_grad()
    step(model)
    fresh.load_state_dict(model.state_dict())
    fresh.zero_grad()
    step(fresh)
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, names[name].grad, rtol=1e-5, atol=1e-6)


# The constants of all layers as one tensor.


def test_constants_are_parts_of_one_tensor_and_follow_their_own_weight() -> None:
    model = model_of()
    step(model)
    step(model)
    whole = {id(layer.adapted.C._base) for layer in model.layers}
    assert len(whole) == 1
    with torch.no_grad():
        model.layers[1].base_layer.weight.mul_(1.5)
    step(model)
    for layer in model.layers:
        torch.testing.assert_close(layer.adapted.C, fresh_copy(layer).adapted.C)
    assert model.layers[1].adapted.C._base is None


def test_constants_that_another_thread_refreshed_are_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [linear(WIDTH, WIDTH).weight.detach().clone() for _ in range(2)]
    adapted = [AdaptedWeight(weight, RANK, shared=SHARED) for weight in weights]
    joined = norm.joined

    def refreshed_meanwhile(constants: list[Tensor]) -> list[Tensor] | None:
        parts = joined(constants)
        weights[1].mul_(3)
        adapted[1].refresh(weights[1])
        return parts

    monkeypatch.setattr("dvora.weight.factor_pass.joined", refreshed_meanwhile)
    _join_constants(adapted)
    for each, weight in zip(adapted, weights, strict=True):
        torch.testing.assert_close(each.C, AdaptedWeight(weight, RANK, shared=SHARED).C)


def test_joined_constants_give_the_bits_of_single_ones() -> None:
    for rank, width in [(3, 6), (40, 120), (16, 300)]:
        layers = [trained_layer(width, width, rank) for _ in range(4)]
        with torch.no_grad():
            for index, layer in enumerate(layers):
                layer.lambda_d.mul_(1 + index)
        norms = [layer.adapted.norm(layer.base_layer.weight) for layer in layers]
        lambda_d = torch.stack([layer.lambda_d.detach() for layer in layers])
        d_cross = randn(4, width, seed=2)
        single = norm.crosses(norms, lambda_d), norm.crosses_gradient(norms, d_cross)
        _join_constants([layer.adapted for layer in layers])
        norms = [layer.adapted.norm(layer.base_layer.weight) for layer in layers]
        assert norms[0].C._base is not None
        together = norm.crosses(norms, lambda_d), norm.crosses_gradient(norms, d_cross)
        assert all(torch.equal(one, other) for one, other in zip(single, together, strict=True))


def test_an_entry_of_another_pass_serves_nobody() -> None:
    model = model_of()
    step(model)
    step(model)
    layer = model.layers[0]
    made: StackedEntry = layer.adapted.kept.stacked
    with torch.no_grad():
        made.packed.trained.mul_(0)
    found = layer(inputs())
    torch.testing.assert_close(found, fresh_copy(layer)(inputs()))
