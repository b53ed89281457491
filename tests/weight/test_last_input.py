"""What the explicit `backward` works on: this thread's last input, the same values and autocast; or it refuses."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dvora import DVoRAAdapter, SharedProjections
from tests.cases import fresh_copy, linear, randn, train, trained_layer
from tests.reference import worst_error

IN, OUT, RANK = 6, 5, 3
X, GRAD_OUTPUT = randn(4, IN, seed=0), randn(4, OUT, seed=1)
VECTORS = ("magnitude", "lambda_b", "lambda_d")


def by_autograd(layer: DVoRAAdapter, x: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """What the explicit backward pass should give, by name."""
    x = x.clone().requires_grad_()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    return dict(zip(["x", *trained], torch.autograd.grad(layer(x), [x, *trained.values()], grad_output), strict=True))


def found(layer: DVoRAAdapter, d_x: Tensor) -> dict[str, Tensor]:
    return {"x": d_x, **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert worst_error(ours[name], gradient.double()) < tolerance, name


def assert_refused(layer: DVoRAAdapter) -> None:
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        layer.backward(GRAD_OUTPUT)
    assert not any(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("frozen", [s for n in (1, 2, 3) for s in itertools.combinations(VECTORS, n)], ids="+".join)
@pytest.mark.parametrize("freeze_base_layer", [True, False], ids=["frozen", "trained base"])
def test_frozen_vectors_get_no_gradients_and_the_others_theirs(
    freeze_base_layer: bool, frozen: tuple[str, ...]
) -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=freeze_base_layer)
    for name in frozen:
        layer.get_parameter(name).requires_grad_(False)
    expected, before = by_autograd(layer, X, GRAD_OUTPUT), layer.get_parameters()
    layer(X)
    assert_close(found(layer, layer.backward(GRAD_OUTPUT)), expected)
    if len(expected) > 1:
        layer.update_parameters(0.1)
    for name, start in zip(VECTORS, (0, OUT, 2 * OUT), strict=True):
        vector = layer.get_parameter(name).detach()
        assert torch.equal(vector, before[start : start + len(vector)]) == (name in frozen), name


def test_a_frozen_bias_of_a_trained_base_gets_no_gradient() -> None:
    layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False)
    layer.base_layer.bias.requires_grad_(False)
    expected = by_autograd(layer, X, GRAD_OUTPUT)
    layer(X)
    assert_close(found(layer, layer.backward(GRAD_OUTPUT)), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("x_trained", [True, False])
def test_neither_input_nor_output_need_be_held(x_trained: bool, mode: Callable[[], object]) -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected = by_autograd(layer, X, GRAD_OUTPUT)
    with mode():
        layer(X.clone().requires_grad_(x_trained))
    assert_close(found(layer, layer.backward(GRAD_OUTPUT)), expected)


def test_a_chain_of_layers_can_be_run_backward_explicitly() -> None:
    first, second = trained_layer(IN, OUT, RANK), trained_layer(OUT, IN, RANK)
    x, grad_output = X.clone().requires_grad_(), randn(4, IN, seed=2)
    (expected,) = torch.autograd.grad(second(first(x).relu()), x, grad_output)
    hidden = first(x)
    second(hidden.relu())
    torch.testing.assert_close(first.backward(second.backward(grad_output) * (hidden > 0)), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["forward outside", "forward under autocast"])
@pytest.mark.parametrize("at_backward", [False, True], ids=["backward outside", "backward under autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_the_forward_pass(dtype: torch.dtype, at_backward: bool, autocast: bool) -> None:
    layer, x, grad_output = trained_layer(64, 48, 8), randn(32, 64, seed=0), randn(32, 48, seed=1)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = layer(reference := x.clone().requires_grad_())
    trained = dict(zip(VECTORS, layer.vectors, strict=True))
    gradients = torch.autograd.grad(y, [reference, *trained.values()], grad_output.to(y.dtype))
    with torch.autocast("cpu", dtype, enabled=autocast):
        layer(x)
    with torch.autocast("cpu", dtype, enabled=at_backward):
        d_x = layer.backward(grad_output)
    assert_close(found(layer, d_x), dict(zip(["x", *trained], gradients, strict=True)))


def fail(layer: DVoRAAdapter) -> None:
    with pytest.raises(RuntimeError):
        layer(X.double())


def offload(layer: DVoRAAdapter) -> None:
    with torch.autograd.graph.save_on_cpu():
        layer(X)


FORGETTING: dict[str, Callable[[DVoRAAdapter], object]] = {
    "autograd's backward": lambda layer: torch.autograd.grad(layer(X).sum(), layer.magnitude),
    "checkpoint": lambda layer: checkpoint(layer, X, use_reentrant=False),
    "reentrant checkpoint": lambda layer: checkpoint(layer, X.clone().requires_grad_(), use_reentrant=True),
    "inference mode": lambda layer: torch.inference_mode()(layer)(X),
    "vmap": lambda layer: vmap(layer)(X),
    "grad": lambda layer: grad(lambda x: layer(x).sum())(X),
    "jvp": lambda layer: jvp(layer, (X,), (X,)),
    "make_fx": lambda layer: make_fx(layer)(X),
    "cast": lambda layer: layer.to(torch.float64),
    "move": lambda layer: layer.to("meta"),
    "failed forward": fail,
    "offloading": offload,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("what", FORGETTING)
def test_an_older_input_is_never_used_and_none_is_left(what: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK, shared=SharedProjections(3)), X.clone()
    layer(x)
    gone = StorageWeakRef(x.untyped_storage())
    del x
    FORGETTING[what](layer)
    assert_refused(layer)
    assert gone.expired()


@pytest.mark.usefixtures("compiler")
def test_after_a_compiled_forward_an_older_input_is_refused() -> None:
    layer = trained_layer(IN, OUT, RANK)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for _ in range(5):
        layer(2 * X)
        compiled(X)
        assert_refused(layer)
    assert len(graphs) <= 2
    layer(X)
    layer.backward(GRAD_OUTPUT)


class Wrapped(torch.autograd.Function):
    """An autograd function whose backward pass is the explicit one."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: DVoRAAdapter) -> Tensor:
        ctx.x, ctx.layer = x.detach(), layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        ctx.layer(ctx.x)
        return ctx.layer.backward(grad_output), None


def test_an_autograd_function_can_call_both_in_its_backward_pass() -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected, x = by_autograd(layer, X, GRAD_OUTPUT), X.clone().requires_grad_()
    y = Wrapped.apply(x, layer)
    assert_refused(layer)
    y.backward(GRAD_OUTPUT)
    assert_close(found(layer, x.grad), expected)


def test_another_threads_pass_is_not_this_threads() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with ThreadPoolExecutor(1) as other:
        other.submit(layer, X).result()
        assert_refused(layer)
        layer(3 * X)
        expected = by_autograd(fresh_copy(layer), X, GRAD_OUTPUT)
        assert_close(found(layer, other.submit(layer.backward, GRAD_OUTPUT).result()), expected)


def test_eval_forgets_the_inputs_of_all_threads() -> None:
    layer = trained_layer(IN, OUT, RANK)
    with ThreadPoolExecutor(1) as other:
        x = X.clone()
        other.submit(layer, x).result()
        gone = StorageWeakRef(x.untyped_storage())
        del x
        layer.eval()
        layer.train()
        assert gone.expired()
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            other.submit(layer.backward, GRAD_OUTPUT).result()


@pytest.mark.usefixtures("hasty_threads")
def test_gradients_of_several_threads_add_up() -> None:
    layer, threads, rounds = trained_layer(IN, OUT, RANK), 4, 10
    inputs = [randn(4, IN, seed=seed) for seed in range(threads)]
    expected = [by_autograd(layer, x, GRAD_OUTPUT) for x in inputs]
    start = threading.Barrier(threads)

    def steps(x: Tensor, d_x: Tensor) -> None:
        start.wait()
        for _ in range(rounds):
            layer(x)
            torch.testing.assert_close(layer.backward(GRAD_OUTPUT), d_x)

    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(steps, x, e["x"]) for x, e in zip(inputs, expected, strict=True)]:
            done.result()
    for name in VECTORS:
        total = rounds * sum(gradients[name].double() for gradients in expected)
        assert worst_error(layer.get_parameter(name).grad, total) < 1e-5, name


CHANGES: dict[str, Callable[[DVoRAAdapter, Tensor], object]] = {
    "input": lambda layer, x: x.add_(1),
    "set_parameters": lambda layer, x: layer.set_parameters(2 * layer.get_parameters()),
    "optimizer": lambda layer, x: torch.optim.SGD([layer.lambda_d], lr=1).step(),
    "load": lambda layer, x: layer.load_state_dict(trained_layer(IN, OUT, RANK).state_dict()),
    "base": lambda layer, x: layer.base_layer.weight.zero_(),
    "new base": lambda layer, x: setattr(layer.base_layer, "weight", torch.nn.Parameter(torch.ones(OUT, IN))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_input_or_a_parameter_that_was_written_to_is_refused(what: str) -> None:
    layer, x = trained_layer(IN, OUT, RANK), X.clone()
    layer.lambda_d.grad = torch.ones(RANK)
    layer(x)
    with torch.no_grad():
        CHANGES[what](layer, x)
    with pytest.raises(RuntimeError, match="changed since the last forward: call the layer again"):
        layer.backward(GRAD_OUTPUT)
    assert layer.magnitude.grad is None


def test_values_that_are_set_for_one_call_are_not_those_of_the_layer() -> None:
    layer = trained_layer(IN, OUT, RANK)
    functional_call(layer, {name: 2 * p.detach() for name, p in layer.named_parameters()}, X)
    with pytest.raises(RuntimeError, match="changed since the last forward"):
        layer.backward(GRAD_OUTPUT)


def test_inputs_that_were_made_in_inference_mode_are_taken() -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected = by_autograd(layer, X, GRAD_OUTPUT)
    with torch.inference_mode():
        x, grad_output = X.clone(), GRAD_OUTPUT.clone()
    layer(x)
    with torch.inference_mode():
        d_x = layer.backward(grad_output)
    assert_close(found(layer, d_x), expected)
    layer.update_parameters(0.1)


def test_gradients_that_were_added_in_inference_mode_can_be_added_to() -> None:
    layer = trained_layer(IN, OUT, RANK)
    for _ in range(2):
        layer(X)
        with torch.inference_mode():
            layer.backward(GRAD_OUTPUT)
    layer(X).backward(GRAD_OUTPUT)
    expected = {name: 3 * gradient for name, gradient in by_autograd(layer, X, GRAD_OUTPUT).items() if name != "x"}
    assert_close({name: vector.grad for name, vector in layer.vectors._asdict().items()}, expected)


def test_a_refused_gradient_leaves_the_input_for_another_try() -> None:
    layer = trained_layer(IN, OUT, RANK)
    expected = by_autograd(layer, X, GRAD_OUTPUT)
    layer(X)
    with pytest.raises(ValueError, match="output_gradient"):
        layer.backward(GRAD_OUTPUT[:1])
    assert_close(found(layer, layer.backward(GRAD_OUTPUT)), expected)


class Twin:
    """A layer, and what its next explicit backward pass should give by autograd: None where it should refuse."""

    def __init__(self) -> None:
        self.layer = trained_layer(IN, OUT, RANK, freeze_base_layer=False, dtype=torch.float64)
        self.expected: dict[str, Tensor] | None = None
        self.grad_output = GRAD_OUTPUT.double()

    def forward(self, mode: Callable[[], AbstractContextManager[object]], kept: bool = True) -> None:
        x = randn(4, IN, seed=7, dtype=torch.float64)
        with mode():
            self.layer(x)
        kept = kept and self.layer.training
        self.expected = by_autograd(fresh_copy_of_flags(self.layer), x, self.grad_output) if kept else None

    def write(self, change: Callable[[DVoRAAdapter], object]) -> None:
        change(self.layer)
        self.expected = None

    def freeze(self, name: str) -> None:
        parameter = self.layer.get_parameter(name)
        parameter.requires_grad_(not parameter.requires_grad)
        if self.expected is not None:
            self.forward(torch.no_grad)

    def backward(self) -> None:
        self.layer.zero_grad()
        if self.expected is None:
            with pytest.raises(RuntimeError, match="call the layer"):
                self.layer.backward(self.grad_output)
        else:
            assert_close(found(self.layer, self.layer.backward(self.grad_output)), self.expected, 1e-12)
        self.expected = None


def fresh_copy_of_flags(layer: DVoRAAdapter) -> DVoRAAdapter:
    copied = fresh_copy(layer)
    for own, other in zip(copied.parameters(), layer.parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return copied


OPERATIONS: dict[str, Callable[[Twin], object]] = {
    "forward": lambda twin: twin.forward(torch.enable_grad),
    "forward in no_grad": lambda twin: twin.forward(torch.no_grad),
    "forward in inference mode": lambda twin: twin.forward(torch.inference_mode, kept=False),
    "forward with offloading": lambda twin: twin.forward(torch.autograd.graph.save_on_cpu, kept=False),
    "vmap": lambda twin: twin.write(lambda layer: vmap(layer)(GRAD_OUTPUT.new_ones(2, IN).double())),
    "autograd": lambda twin: twin.write(lambda layer: layer(GRAD_OUTPUT.new_ones(2, IN).double()).sum().backward()),
    "set": lambda twin: twin.write(lambda layer: layer.set_parameters(1.1 * layer.get_parameters())),
    "load": lambda twin: twin.write(lambda layer: layer.load_state_dict(layer.state_dict())),
    "cast": lambda twin: twin.write(lambda layer: layer.float().double()),
    "eval": lambda twin: twin.write(lambda layer: layer.eval()),
    "train": lambda twin: twin.layer.train(),
    "reset": lambda twin: twin.write(lambda layer: layer.reset_state()),
    "copy": lambda twin: twin.write(lambda layer: setattr(twin, "layer", copy.deepcopy(layer))),
    "pickle": lambda twin: twin.write(lambda layer: setattr(twin, "layer", pickle.loads(pickle.dumps(layer)))),
    "freeze magnitude": lambda twin: twin.freeze("magnitude"),
    "freeze lambda_d": lambda twin: twin.freeze("lambda_d"),
    "freeze the base": lambda twin: twin.freeze("base_layer.weight"),
    "backward": lambda twin: twin.backward(),
}


@given(names=st.lists(st.sampled_from([*OPERATIONS]), min_size=4, max_size=12))
def test_after_any_sequence_backward_is_autograds_or_refused(names: list[str]) -> None:
    twin = Twin()
    for name in names:
        OPERATIONS[name](twin)
    twin.backward()


def test_a_parameter_of_the_base_without_a_part_in_the_outputs_gets_no_gradient() -> None:
    base = linear(IN, OUT)
    base.unused = torch.nn.Parameter(torch.ones(2))
    layer = train(DVoRAAdapter(base, RANK, freeze_base_layer=False, shared=trained_layer(IN, OUT, RANK).shared))
    layer(X)
    layer.backward(GRAD_OUTPUT)
    assert base.unused.grad is None
    assert base.weight.grad is not None
