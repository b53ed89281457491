"""One projection for the layers that read the same inputs, and a new one whenever anything about them has changed."""

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from dvora import DVoRAAdapter
from dvora.matrices.interface import DISTRIBUTIONS, SharedProjections
from dvora.weight.adapted_weight import AdaptedWeight
from tests.matrices.sibling_layers import IN, TOKENS, Products, inputs, loss, outputs, projections_made, siblings

Layers = Sequence[DVoRAAdapter]
Change = Callable[[Tensor], object]


def test_three_siblings_make_one_product_and_one_of_its_transpose() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    with Products() as products:
        loss(outputs(layers, x)).backward()
    assert (products.forward(), products.backward()) == (1, 1)


def test_layers_that_share_nothing_make_three() -> None:
    layers, x = siblings(together=False), inputs(requires_grad=True)
    with Products() as products:
        loss(outputs(layers, x)).backward()
    assert (products.forward(), products.backward()) == (3, 3)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_outputs_are_those_of_layers_that_share_nothing(mode: type, training: bool) -> None:
    def step(layers: Layers) -> list[Tensor]:
        with mode():
            return [layer.train(training)(x) for layer in layers]

    x = inputs()
    assert projections_made(step) == 1


def test_inputs_of_inference_mode_are_projected_anew_for_their_changes_are_not_counted() -> None:
    def step(layers: Layers) -> list[Tensor]:
        with torch.inference_mode():
            x = inputs()
            first = layers[0](x)
            return [first, layers[1](x.mul_(2)), layers[2](x)]

    assert projections_made(step) == 3


@torch.no_grad()
def write_through_a_view(x: Tensor) -> None:
    x.view(-1)[3:9].zero_()


def add_in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x.add_(1)


def assign_data(x: Tensor) -> None:
    x.data = inputs(seed=9)


CHANGES: dict[str, Change] = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(inputs(seed=9)),
    "out": lambda x: torch.mul(x, 3, out=x),
    "foreach": lambda x: torch._foreach_mul_([x], 3.0),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([1]), 2.0),
    "item": lambda x: x.__setitem__(slice(1, 3), 0),
    "set_": lambda x: x.set_(inputs(seed=9)),
    "resize_": lambda x: x.resize_(2, IN),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "relu": lambda x: torch.nn.functional.relu(x, inplace=True),
    "view": write_through_a_view,
    "inference": add_in_inference_mode,
    "data": assign_data,
    "data in place": lambda x: x.data.mul_(2),
    "numpy": lambda x: x.numpy().fill(0.5),
    "numpy that was there before": lambda x: NUMPY[x.data_ptr()].fill(0.5),
}
NUMPY: dict[int, np.ndarray] = {}
"""Arrays of the memory of inputs, made before they are projected."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_inputs_changed_between_siblings_are_projected_anew(mode: type, change: str) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs()
        NUMPY[x.data_ptr()] = x.numpy()
        with mode():
            first = layers[0](x)
            CHANGES[change](x)
            return [first, layers[1](x), layers[2](x)]

    assert projections_made(step) == 2
    NUMPY.clear()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_sharing_can_be_switched_off(mode: type) -> None:
    def step(layers: Layers) -> list[Tensor]:
        for layer in layers:
            layer.shared.share_inputs = False
        with mode():
            return [outputs(layers, inputs())]

    assert projections_made(step) == 3
    assert not SharedProjections(0, share_inputs=False).share_inputs


def test_inputs_transposed_in_place_are_projected_anew() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(IN)
        first = layers[0](x)
        x.t_()
        return [first, layers[1](x)]

    assert projections_made(step) == 2


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x.view(2, -1, IN), lambda x: x.detach(), lambda x: x[:]])
def test_other_tensors_of_the_same_memory_are_projected_for_themselves(view: Callable[[Tensor], Tensor]) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(IN)
        return [layers[0](x), layers[1](view(x)), layers[2](x)]

    assert projections_made(step) == 3


def test_a_layer_that_asks_twice_gets_a_new_projection_for_a_write_that_torch_does_not_count() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs()
        first = outputs(layers, x)
        x.data.mul_(2)
        return [first, outputs(layers, x)]

    assert projections_made(step) == 2


def test_inputs_that_come_to_want_a_gradient_get_it() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs()
        first = layers[0](x)
        x.requires_grad_()
        loss(layers[1](x)).backward()
        return [first, x.grad]

    assert projections_made(step) == 2


def test_inputs_that_become_a_leaf_get_their_gradient_and_pass_none_on() -> None:
    def step(layers: Layers) -> list[Tensor]:
        before = inputs(requires_grad=True)
        x = before * 1
        first = layers[0](x)
        x.detach_().requires_grad_()
        loss(layers[1](x)).backward()
        assert before.grad is None
        return [first, x.grad]

    assert projections_made(step) == 2


@contextmanager
def enabled_in_inference_mode() -> Iterator[None]:
    with torch.inference_mode(), torch.enable_grad():
        yield


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.autocast("cpu", dtype=dtype)


MODES = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "bfloat16": autocast(torch.bfloat16),
    "float16": autocast(torch.float16),
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_projection_is_of_one_way_of_running(first: str, second: str) -> None:
    def step(layers: Layers) -> list[Tensor]:
        with MODES[first]():
            results = [layers[0](x)]
        with MODES[second]():
            results += [layer(x) for layer in layers[1:]]
        if second != "no_grad":
            loss(torch.cat(results[1:], -1)).backward()
        return results

    # Autocast leaves float64 alone.
    x = inputs().float()
    assert projections_made(step, dtype=torch.float32) == (1 if first == second else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_autocast_get_their_gradient(dtype: torch.dtype) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs().float().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = outputs(layers, x)
        loss(y).backward()
        return [y, x.grad.to(dtype)]

    assert projections_made(step, tolerance=5e-2, dtype=torch.float32) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.inference_mode, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.enable_grad),
        (torch.no_grad, torch.enable_grad),
        pytest.param(enabled_in_inference_mode, torch.enable_grad),
        pytest.param(torch.enable_grad, enabled_in_inference_mode),
    ],
    ids=lambda mode: mode.__name__,
)
def test_modes_may_be_mixed_for_one_tensor(first: type, second: type) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs()
        layers[0].requires_grad_(False).eval()
        with first():
            y = layers[0](x)
        with second():
            others = [layers[1](x), layers[2](x)]
        if second is torch.enable_grad:
            loss(torch.cat(others, -1)).backward()
        return [y, *others]

    projections_made(step)


def test_each_rank_has_its_own_projection() -> None:
    def step(layers: Layers) -> list[Tensor]:
        return [layers[0](x), layers[2](x), layers[1](x)]

    x = inputs()
    assert projections_made(step, ranks=(3, 4, 3)) == 2


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_kind_of_matrices_is_shared(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), inputs()
    weights = [torch.ones(5, IN), torch.ones(7, IN)]
    first, second = (AdaptedWeight(weight, 3, shared=shared) for weight in weights)
    z = shared.project_once(x, 3, first)
    assert shared.project_once(x, 3, second) is z
    assert shared.project_once(x, 3, second) is not z
    assert torch.equal(z, shared.project(x, 3))


def replaced(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (2 * args[0],)


def changed(_: object, args: tuple[Tensor, ...]) -> None:
    args[0].add_(1)


@pytest.mark.parametrize("hook", [replaced, changed])
def test_a_hook_may_give_one_sibling_other_inputs(hook: Callable[..., object]) -> None:
    def step(layers: Layers) -> list[Tensor]:
        handle = layers[1].register_forward_pre_hook(hook)
        results = [layer(x.clone()) for layer in layers]
        x_ = x.clone()
        results += [layer(x_) for layer in layers]
        handle.remove()
        return results

    x = inputs()
    assert projections_made(step) > 3


def test_a_hook_may_change_the_inputs_after_a_sibling() -> None:
    def step(layers: Layers) -> list[Tensor]:
        handle = layers[0].register_forward_hook(lambda _, args, __: args[0].mul_(2).shape and None)
        x = inputs()
        results = [layer(x) for layer in layers]
        handle.remove()
        return results

    assert projections_made(step) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_copies_have_a_projection_of_their_own(copied: Callable[[Layers], Layers]) -> None:
    layers, x = siblings(), inputs()
    expected = outputs(layers, x)
    others = copied(layers)
    assert others[0].shared._last is not layers[0].shared._last
    with Products() as products:
        found = outputs(others, x)
    assert products.forward(TOKENS) == 1
    assert torch.equal(found, expected)
