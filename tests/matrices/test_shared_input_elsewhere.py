"""Siblings in threads, on streams, under PyTorch's transformations, and what is freed afterwards."""

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

from dvora import DVoRAAdapter
from tests.matrices.sibling_layers import IN, Products, inputs, loss, outputs, projections_made, siblings

Layers = Sequence[DVoRAAdapter]

# PyTorch's own use of what it has deprecated, in its first forward-mode derivative.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Together(nn.Module):
    """Siblings as one module."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return outputs(self.layers, x)


def test_a_thread_takes_nothing_from_another() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(layers[0], x).result()
        with Products() as products:
            second = layers[1](x)
        assert products.forward() == 1
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


def test_vmap_equals_one_input_after_another() -> None:
    layers, xs = siblings(), inputs(12).view(3, 4, IN)
    found = vmap(partial(outputs, layers))(xs)
    torch.testing.assert_close(found, torch.stack([outputs(layers, x) for x in xs]), rtol=1e-12, atol=1e-12)


@forward_mode
def test_transformations_give_the_gradients_of_autograd() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    (expected,) = torch.autograd.grad(loss(outputs(layers, x)), [x])
    x = x.detach()
    found = grad(lambda x: loss(outputs(layers, x)))(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    _, along = jvp(lambda x: loss(outputs(layers, x)), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, expected.sum(), rtol=1e-12, atol=1e-12)
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


def test_siblings_may_be_called_with_other_vectors_between() -> None:
    def step(layers: Layers) -> list[Tensor]:
        model, x = Together(layers), inputs()
        values = {name: 1.5 * value.detach() for name, value in model.named_parameters() if value.requires_grad}
        return [model(x), functional_call(model, values, x), model(x)]

    assert projections_made(step) == 3


@pytest.mark.usefixtures("compiler")
def test_compiled_siblings_are_one_graph_and_follow_writes_to_their_inputs() -> None:
    model = Together(siblings())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = inputs(requires_grad=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
        found, expected = (torch.autograd.grad(loss(each(x)), [x])[0] for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            x.mul_(2)


@pytest.mark.usefixtures("compiler")
def test_a_compiled_sibling_leaves_nothing_to_one_that_is_not() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        together = layers[0].shared is layers[1].shared
        first = torch.compile(layers[0], backend="aot_eager") if together else layers[0]
        loss(torch.cat([layers[1](x), first(x), layers[2](x)], -1)).backward()
        return [x.grad]

    projections_made(step)


def projections_alive(layers: Layers) -> list[weakref.ref[Tensor]]:
    """Weak references to everything that is projected from now on."""
    made: list[weakref.ref[Tensor]] = []
    matrices = layers[0].shared.impl
    project = matrices.project

    def remembered(x: Tensor, rank: int) -> Tensor:
        z = project(x, rank)
        made.append(weakref.ref(z))
        return z

    matrices.project = remembered
    return made


def alive(references: Sequence[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_projection_goes_with_its_inputs(mode: type) -> None:
    layers = [layer.eval() for layer in siblings()]
    made = projections_alive(layers)
    with mode():
        x = inputs()
        outputs(layers, x)
        assert alive(made) == 1
        seen = weakref.ref(x)
        del x
    assert (alive(made), alive([seen])) == (0, 0)


@pytest.mark.parametrize("made_by_a_layer", [pytest.param(False, id="leaf"), pytest.param(True, id="made")])
def test_a_projection_with_a_graph_goes_with_its_inputs(made_by_a_layer: bool) -> None:
    layers = [layer.eval() for layer in siblings()]
    made = projections_alive(layers)
    x = inputs(requires_grad=True)
    x = torch.tanh(x) if made_by_a_layer else x
    outputs(layers, x)
    seen = weakref.ref(x)
    del x
    assert (alive(made), alive([seen])) == (0, 0)


def test_the_graph_of_the_inputs_goes_with_them() -> None:
    layers = [layer.eval() for layer in siblings()]
    before = 2 * inputs(requires_grad=True)
    x = before.square()
    outputs(layers, x)
    seen = weakref.ref(before)
    del before, x
    assert alive([seen]) == 0


def test_a_backward_pass_frees_the_projection_of_inputs_that_stay() -> None:
    layers, x = siblings(), inputs(requires_grad=True)
    made = projections_alive(layers)
    loss(outputs(layers, x)).backward()
    assert alive(made) == 0


def test_never_more_than_one_projection_is_kept() -> None:
    layers, xs = siblings(), [inputs(seed=seed) for seed in range(5)]
    made = projections_alive(layers)
    with torch.no_grad():
        for x in xs:
            outputs(layers, x)
    assert len(made) == 5
    assert alive(made) == 1


def test_inputs_that_only_a_graph_holds_are_still_theirs() -> None:
    def step(layers: Layers) -> list[Tensor]:
        x = inputs(requires_grad=True)
        y, kept = layers[0](x), x.square()
        del x
        gc.collect()
        x = kept.grad_fn._saved_self
        loss(torch.cat([y, outputs(layers[1:], x)], -1)).backward()
        return [x.grad]

    assert projections_made(step) == 1


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a CUDA device")


@cuda
def test_a_stream_takes_nothing_from_another() -> None:
    layers, x = [layer.cuda() for layer in siblings()], inputs().cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        first = layers[0](x)
        stream.wait_stream(torch.cuda.current_stream())
        with Products() as products, torch.cuda.stream(stream):
            others = outputs(layers[1:], x)
        torch.cuda.synchronize()
        assert products.forward() == 1
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
