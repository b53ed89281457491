"""Siblings share one projection, and still every order of backward passes gives the gradients of separate layers."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dvora import DVoRAAdapter
from tests.matrices.sibling_layers import Products, Step, inputs, loss, outputs, projections_made, siblings

Layers = Sequence[DVoRAAdapter]
Checkpoint = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def one_pass(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    loss(outputs(layers, x)).backward()
    return [x.grad]


def backward_after_each_layer(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    for layer in layers:
        loss(layer(x)).backward()
    return [x.grad]


def backward_at_the_end_for_each_layer(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    for y in [layer(x) for layer in layers]:
        loss(y).backward()
    return [x.grad]


def backward_with_the_graph_kept(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    for y in [layer(x) for layer in layers]:
        loss(y).backward(retain_graph=True)
    return [x.grad]


def backward_between_layers_with_the_graph_kept(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    first = layers[0](x)
    loss(first).backward(retain_graph=True)
    loss(torch.cat([first, layers[1](x), layers[2](x)], -1)).backward()
    return [x.grad]


def gradients_of_vectors_between_layers(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    found = torch.autograd.grad(loss(layers[0](x)), list(layers[0].vectors))
    loss(outputs(layers[1:], x)).backward()
    return [*found, x.grad]


def gradients_of_inputs_between_layers(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    found = torch.autograd.grad(loss(layers[0](x)), [x])
    loss(outputs(layers[1:], x)).backward()
    return [*found, x.grad]


def two_passes_over_one_leaf(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    for _ in range(2):
        loss(outputs(layers, x)).backward()
    return [x.grad]


def a_step_between_two_passes_over_one_leaf(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(2):
        loss(outputs(layers, x)).backward()
        optimizer.step()
    return [x]


def two_forward_passes_and_one_backward(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    y = outputs(layers, x)
    loss(y + outputs(layers, x)).backward()
    return [x.grad]


def an_input_that_other_layers_made(layers: Layers) -> list[Tensor]:
    before = inputs(requires_grad=True)
    loss(outputs(layers, torch.tanh(before))).backward()
    return [before.grad]


def a_penalty_on_the_gradient(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(outputs(layers, x)), [x], create_graph=True)
    gradient.square().sum().backward()
    return [x.grad]


STEPS = {
    one_pass: 1,
    backward_after_each_layer: 3,
    backward_with_the_graph_kept: 1,
    backward_between_layers_with_the_graph_kept: 1,
    gradients_of_vectors_between_layers: 2,
    gradients_of_inputs_between_layers: 2,
    two_passes_over_one_leaf: 2,
    a_step_between_two_passes_over_one_leaf: 2,
    two_forward_passes_and_one_backward: 2,
    an_input_that_other_layers_made: 1,
}
"""And how often x is projected."""


@pytest.mark.parametrize(("step", "projected"), STEPS.items(), ids=[step.__name__ for step in STEPS])
def test_gradients_are_those_of_layers_that_share_nothing(step: Step, projected: int) -> None:
    assert projections_made(step) == projected


def test_second_derivatives_are_those_of_layers_that_share_nothing() -> None:
    projections_made(a_penalty_on_the_gradient)


def test_each_layer_may_have_a_backward_pass_of_its_own() -> None:
    assert projections_made(backward_at_the_end_for_each_layer) == 1


def test_gradients_are_the_limits_of_differences() -> None:
    layers = siblings()
    # It writes to x through x.data, which PyTorch does not count.
    assert torch.autograd.gradcheck(partial(outputs, layers), [inputs(requires_grad=True)])
    assert torch.autograd.gradgradcheck(partial(outputs, layers), [inputs(requires_grad=True)])


def all_inside(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return run(partial(outputs, layers), x)


def one_before(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return torch.cat([layers[0](x), run(partial(outputs, layers[1:]), x)], -1)


def one_after(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    inside = run(partial(outputs, layers[1:]), x)
    return torch.cat([layers[0](x), inside], -1)


def one_inside(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return torch.cat([layers[0](x), run(layers[1], x), layers[2](x)], -1)


def each_for_itself(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return torch.cat([run(layer, x) for layer in layers], -1)


def nested(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return run(lambda x: torch.cat([layers[0](x), run(partial(outputs, layers[1:]), x)], -1), x)


def nested_first(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        inside = run(partial(outputs, layers[1:]), x)
        return torch.cat([layers[0](x), inside], -1)

    return run(inner, x)


def made_inside(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return run(lambda x: outputs(layers, torch.tanh(x)), x)


def closed_over(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    first = layers[0](x)
    return torch.cat([first, run(lambda other: layers[1](x) + layers[1](other), x), layers[2](x)], -1)


def after_one_without_gradients(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    with torch.no_grad():
        first = layers[0](x)
    return torch.cat([first, run(partial(outputs, layers[1:]), x)], -1)


PLACES = [
    *(all_inside, one_before, one_after, one_inside, each_for_itself),
    *(nested, nested_first, made_inside, closed_over, after_one_without_gradients),
]


@pytest.mark.parametrize("early_stop", [True, False], ids=["early stop", "to the end"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("place", PLACES, ids=[place.__name__ for place in PLACES])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "made"])
def test_checkpointed_layers_have_the_gradients_of_others(
    place: Callable[[Layers, Checkpoint, Tensor], Tensor], use_reentrant: bool, early_stop: bool, leaf: bool
) -> None:
    def step(layers: Layers) -> list[Tensor]:
        # Layers that share nothing need no checkpoints to be right.
        together = layers[0].shared is layers[1].shared
        run = partial(checkpoint, use_reentrant=use_reentrant) if together else lambda function, x: function(x)
        before = inputs(requires_grad=True)
        with set_checkpoint_early_stop(early_stop):
            y = place(layers, run, before if leaf else 2 * before)
            loss(y).backward()
        return [y, before.grad]

    if place is closed_over and use_reentrant and not leaf:
        pytest.skip("a reentrant checkpoint cannot differentiate through what it closes over, whatever the layers")
    projections_made(step)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_siblings_share_in_both_of_their_passes(use_reentrant: bool) -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    with Products() as products:
        loss(checkpoint(lambda x: outputs(layers, 2 * x), x, use_reentrant=use_reentrant)).backward()
    assert (products.forward(), products.backward()) == (2, 1)


@contextmanager
def packed(log: list[Tensor]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        log.append(tensor)
        return tensor.detach().clone()

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with saved_tensors_hooks(pack, unpack):
        yield


@pytest.mark.parametrize("hooks", [lambda: packed([]), save_on_cpu])
def test_hooks_on_saved_tensors_change_no_gradient(hooks: Callable[[], packed]) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        first = layers[0](x)
        with hooks():
            second = layers[1](x)
            with hooks():
                third = layers[2](x)
            fourth = layers[1](x)
        loss(torch.cat([first, second, third, fourth], -1)).backward()
        return [x.grad]

    assert projections_made(step) == 4


def test_a_hook_sees_the_same_whatever_ran_before_it() -> None:
    layers, x, logs = siblings(), inputs(requires_grad=True), ([], [])
    for log in logs:
        with packed(log):
            layers[1](x)
        layers[0](x)
    assert len(logs[0]) == len(logs[1]) > 0


def test_siblings_under_one_hook_share() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        with packed([]):
            y = outputs(layers, x)
        loss(y).backward()
        return [x.grad]

    assert projections_made(step) == 1


def test_a_hook_may_be_anything_that_can_be_called() -> None:
    with saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        outputs(siblings(), inputs(requires_grad=True))


def test_no_hook_is_kept_by_what_was_projected_under_it() -> None:
    layers, x = siblings(), inputs()

    def hook(tensor: Tensor) -> Tensor:
        return tensor

    with saved_tensors_hooks(hook, hook), torch.no_grad():
        layers[0](x)
    kept = weakref.ref(hook)
    del hook
    gc.collect()
    assert kept() is None
    with packed([]), torch.no_grad():
        assert torch.equal(layers[1](x), siblings()[1](x))
