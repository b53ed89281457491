"""Siblings share one projection of their inputs, and outputs and gradients are those of layers that share nothing."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from dvora.matrices.interface import DISTRIBUTIONS, SharedProjections
from dvora.weight.adapted_weight import AdaptedWeight
from tests.cached_layers import IN, Siblings
from tests.matrices.siblings import (
    Calls,
    Layers,
    Step,
    inputs,
    loss,
    outputs,
    projections_made,
    siblings,
)

# PyTorch's own use of what it has deprecated, in its first forward-mode derivative.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.mark.parametrize(("together", "products"), [(True, 1), (False, 3)])
def test_siblings_make_one_product_and_one_of_its_transpose(together: bool, products: int) -> None:
    layers = siblings(together)
    calls = Calls(layers)
    loss(outputs(layers, inputs(requires_grad=True))).backward()
    assert (calls.forward, calls.backward) == (products, products)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_kind_of_matrices_is_shared_but_not_twice_with_one_layer(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), inputs()
    first, second = (AdaptedWeight(weight, 3, shared=shared) for weight in (torch.ones(5, IN), torch.ones(7, IN)))
    z = shared.project_once(x, 3, first)
    assert shared.project_once(x, 3, second) is z
    assert shared.project_once(x, 3, second) is not z
    assert torch.equal(z, shared.impl.project(x, 3))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_sharing_can_be_switched_off(mode: type, training: bool) -> None:
    def step(layers: Layers, share: bool) -> list[Tensor]:
        for layer in layers:
            layer.train(training).shared.share_inputs = share
        with mode():
            return [outputs(layers, inputs())]

    assert projections_made(partial(step, share=True)) == 1
    assert projections_made(partial(step, share=False)) == 3
    assert not SharedProjections(0, share_inputs=False).share_inputs


def autocast(dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.autocast("cpu", dtype=dtype)


@contextmanager
def enabled_in_inference_mode() -> Iterator[None]:
    with torch.inference_mode(), torch.enable_grad():
        yield


MODES = {
    "grad": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad in inference": enabled_in_inference_mode,
    "bfloat16": autocast(torch.bfloat16),
    "float16": autocast(torch.float16),
}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_projection_is_of_one_way_of_running(first: str, second: str) -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs().float()
        layers[0].requires_grad_(False).eval()
        with MODES[first]():
            results = [layers[0](x)]
        with MODES[second]():
            results += [layer(x) for layer in layers[1:]]
        if second in ("grad", "bfloat16", "float16"):
            loss(torch.cat(results[1:], -1)).backward()
        return results

    # Autocast leaves float64 alone.
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


def test_each_rank_has_its_own_projection() -> None:
    x = inputs()
    assert projections_made(lambda layers: [layers[0](x), layers[2](x), layers[1](x)], ranks=(3, 4, 3)) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layers: pickle.loads(pickle.dumps(layers))])
def test_copies_have_a_projection_of_their_own(copied: Callable[[Layers], Layers]) -> None:
    layers, x = siblings(), inputs()
    expected = outputs(layers, x)
    others = copied(layers)
    assert others[0].shared._projection_cache is not layers[0].shared._projection_cache
    assert torch.equal(outputs(others, x), expected)
    calls = Calls(others)
    outputs(others, inputs(seed=1))
    assert calls.forward == 1


# Orders of passes: what is done, and how often x is projected.


def inputs_that_come_to_want_a_gradient(layers: Layers) -> list[Tensor]:
    x = inputs()
    first = layers[0](x)
    loss(layers[1](x.requires_grad_())).backward()
    return [first, x.grad]


def inputs_that_become_a_leaf(layers: Layers) -> list[Tensor]:
    before = inputs(requires_grad=True)
    x = before * 1
    first = layers[0](x)
    x.detach_().requires_grad_()
    loss(layers[1](x)).backward()
    assert before.grad is None
    return [first, x.grad]


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
    first = layers[0](x)
    loss(first).backward(retain_graph=True)
    loss(torch.cat([first, layers[1](x), layers[2](x)], -1)).backward()
    return [x.grad]


def gradients_between_layers(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    found = torch.autograd.grad(loss(layers[0](x)), [*layers[0].vectors, x])
    loss(outputs(layers[1:], x)).backward()
    return [*found, x.grad]


def a_step_between_two_passes_over_one_leaf(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(2):
        loss(outputs(layers, x)).backward()
        optimizer.step()
    return [x]


def two_passes_over_one_leaf(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    for _ in range(2):
        loss(outputs(layers, x)).backward()
    return [x.grad]


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


def other_vectors_between_two_passes(layers: Layers) -> list[Tensor]:
    model, x = Siblings(layers), inputs()
    values = {name: 1.5 * value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return [model(x), functional_call(model, values, x), model(x)]


def inputs_that_only_a_graph_holds(layers: Layers) -> list[Tensor]:
    x = inputs(requires_grad=True)
    y, kept = layers[0](x), x.square()
    del x
    gc.collect()
    x = kept.grad_fn._saved_self
    loss(torch.cat([y, outputs(layers[1:], x)], -1)).backward()
    return [x.grad]


STEPS: dict[Step, int | None] = {
    inputs_that_come_to_want_a_gradient: 2,
    inputs_that_become_a_leaf: 2,
    one_pass: 1,
    backward_after_each_layer: 3,
    backward_at_the_end_for_each_layer: 1,
    backward_with_the_graph_kept: 1,
    gradients_between_layers: 2,
    two_passes_over_one_leaf: 2,
    a_step_between_two_passes_over_one_leaf: 2,
    two_forward_passes_and_one_backward: 2,
    an_input_that_other_layers_made: 1,
    a_penalty_on_the_gradient: None,
    other_vectors_between_two_passes: 3,
    inputs_that_only_a_graph_holds: 1,
}


@pytest.mark.parametrize("step", STEPS, ids=[step.__name__ for step in STEPS])
def test_gradients_are_those_of_layers_that_share_nothing(step: Step) -> None:
    assert projections_made(step) == STEPS[step] or STEPS[step] is None


def test_gradients_are_the_limits_of_differences() -> None:
    layers = siblings()
    # It writes to x through x.data, which PyTorch does not count.
    assert torch.autograd.gradcheck(partial(outputs, layers), [inputs(requires_grad=True)])
    assert torch.autograd.gradgradcheck(partial(outputs, layers), [inputs(requires_grad=True)])


# Threads, transformations and streams.


def test_a_thread_takes_nothing_from_another() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    calls = Calls(layers)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(layers[0], x).result()
    second = layers[1](x)
    assert calls.forward == 2
    # Both graphs can be freed.
    loss(first).backward()
    loss(second).backward()


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_share_the_layers_and_the_inputs() -> None:
    layers, own, common = siblings(), [inputs(seed=seed) for seed in range(8)], inputs(requires_grad=True)

    def passes(x: Tensor) -> list[Tensor]:
        found = []
        for _ in range(10):
            y = outputs(layers, common)
            found += [*torch.autograd.grad(loss(y), [common]), outputs(layers, x).detach()]
        return found

    expected = [[*torch.autograd.grad(loss(outputs(layers, common)), [common]), outputs(layers, x)] for x in own]
    with ThreadPoolExecutor(8) as pool:
        for found, (gradient, y) in zip(pool.map(passes, own), expected, strict=True):
            assert all(torch.equal(value, gradient) for value in found[::2])
            assert all(torch.equal(value, y) for value in found[1::2])


@forward_mode
def test_transformations_give_the_values_and_gradients_of_autograd() -> None:
    layers, x, xs = siblings(), inputs(requires_grad=True), inputs(12).view(3, 4, IN)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(vmap(partial(outputs, layers))(xs), torch.stack([outputs(layers, x) for x in xs]))
    (expected,) = torch.autograd.grad(loss(outputs(layers, x)), [x])
    x = x.detach()
    close(grad(lambda x: loss(outputs(layers, x)))(x), expected)
    _, along = jvp(lambda x: loss(outputs(layers, x)), (x,), (torch.ones_like(x),))
    close(along, expected.sum())
    assert jacrev(partial(outputs, layers))(x).shape == (4, 22, 4, IN)


@forward_mode
def test_a_tangent_is_neither_lost_nor_left_behind() -> None:
    layers, x = siblings(), inputs()
    expected = outputs(layers, x)
    _, along = jvp(partial(outputs, siblings(together=False)), (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(outputs(layers, dual)).tangent
        torch.testing.assert_close(tangent, along, rtol=1e-12, atol=1e-12)
        assert forward_ad.unpack_dual(outputs(layers, x)).tangent is None
    assert torch.equal(outputs(layers, x), expected)


@pytest.mark.usefixtures("compiler")
def test_compiled_siblings_have_the_gradients_of_others_also_beside_them() -> None:
    model, x = Siblings(siblings()), inputs(requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, expected = (torch.autograd.grad(loss(each(x)), [x])[0] for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            x.mul_(2)

    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        together = layers[0].shared is layers[1].shared
        first = torch.compile(layers[0], backend="aot_eager") if together else layers[0]
        loss(torch.cat([layers[1](x), first(x), layers[2](x)], -1)).backward()
        return [x.grad]

    projections_made(step)


# What is freed.


@pytest.fixture
def small_heap() -> Iterator[None]:
    """What is there already is left out of the collections, which take a second each of a whole suite's objects."""
    gc.freeze()
    yield
    gc.unfreeze()


def alive(references: Sequence[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.usefixtures("small_heap")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_projection_goes_with_its_inputs_and_their_graph(requires_grad: bool, leaf: bool, mode: type) -> None:
    layers = [layer.eval() for layer in siblings()]
    calls, before = Calls(layers), inputs(requires_grad=requires_grad)
    x = before if leaf else (2 * before).square()
    with mode():
        outputs(layers, x)
    assert alive(calls.made) == (not (leaf and requires_grad))
    seen = [weakref.ref(before), weakref.ref(x)]
    del before, x
    assert (alive(calls.made), alive(seen)) == (0, 0)


@pytest.mark.usefixtures("small_heap")
def test_a_backward_pass_frees_the_projection_of_inputs_that_stay() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    calls = Calls(layers)
    loss(outputs(layers, x)).backward()
    assert alive(calls.made) == 0


@pytest.mark.usefixtures("small_heap")
def test_never_more_than_one_projection_is_kept() -> None:
    layers, xs = siblings(), [inputs(seed=seed) for seed in range(5)]
    calls = Calls(layers)
    with torch.no_grad():
        for x in xs:
            outputs(layers, x)
    assert (calls.forward, alive(calls.made)) == (5, 1)


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")


@cuda
def test_a_stream_takes_nothing_from_another() -> None:
    layers, x = [layer.cuda() for layer in siblings()], inputs().cuda()
    stream, calls = torch.cuda.Stream(), Calls(layers)
    with torch.no_grad():
        first = layers[0](x)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            others = outputs(layers[1:], x)
        torch.cuda.synchronize()
        assert calls.forward == 2
        expected = outputs([layer.cuda() for layer in siblings(together=False)], x)
    torch.testing.assert_close(torch.cat([first, others], -1), expected)


@cuda
def test_a_captured_graph_projects_for_itself() -> None:
    layers, x = [layer.cuda().eval() for layer in siblings()], inputs().cuda()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        outputs(layers, x)  # what is made once is made before the capture
        layers[0](x)
        graph.capture_begin()
        y = layers[1](x)
        graph.capture_end()
        x.copy_(inputs(seed=9))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, layers[1](x.clone()))
