"""Siblings under checkpointing and hooks on saved tensors have the gradients of layers that share nothing."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tests.matrices.siblings import Calls, Layers, inputs, loss, outputs, projections_made, siblings

Checkpoint = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


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
    return run(lambda x: one_before(layers, run, x), x)


def nested_first(layers: Layers, run: Checkpoint, x: Tensor) -> Tensor:
    return run(lambda x: one_after(layers, run, x), x)


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


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("place", PLACES, ids=[place.__name__ for place in PLACES])
def test_checkpointed_layers_have_the_gradients_of_others(
    place: Callable[[Layers, Checkpoint, Tensor], Tensor], use_reentrant: bool
) -> None:
    def step(layers: Layers, leaf: bool, early_stop: bool) -> list[Tensor]:
        # Layers that share nothing need no checkpoints to be right.
        together = layers[0].shared is layers[1].shared
        run = partial(checkpoint, use_reentrant=use_reentrant) if together else lambda function, x: function(x)
        before = inputs(requires_grad=True)
        with set_checkpoint_early_stop(early_stop):
            y = place(layers, run, before if leaf else 2 * before)
            loss(y).backward()
        return [y, before.grad]

    for leaf in (True, False):
        # A reentrant checkpoint cannot differentiate through what it closes over, whatever the layers.
        if place is not closed_over or leaf or not use_reentrant:
            projections_made(partial(step, leaf=leaf, early_stop=True))
            projections_made(partial(step, leaf=leaf, early_stop=False))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_siblings_share_in_both_of_their_passes(use_reentrant: bool) -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    calls = Calls(layers)
    loss(checkpoint(lambda x: outputs(layers, 2 * x), x, use_reentrant=use_reentrant)).backward()
    assert (calls.forward, calls.backward) == (2, 1)


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
def test_layers_share_under_one_hook_on_saved_tensors_only(hooks: Callable[[], AbstractContextManager[None]]) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        first = layers[0](x)
        with hooks():
            second = layers[1](x)
            with hooks():
                third = torch.cat([layers[2](x), layers[0](x)], -1)
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


def test_a_hook_may_be_anything_that_can_be_called_and_is_not_kept() -> None:
    with saved_tensors_hooks(torch.Tensor.clone, torch.Tensor.clone):
        outputs(siblings(), inputs(requires_grad=True))
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
