"""Operations that run the model: forwards, backwards, steps, and the circumstances that they run in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from tests.histories.checks import drawn_like
from tests.histories.lines import elsewhere
from tests.histories.operations import (
    GRADIENTS,
    OUTPUTS,
    Case,
    MismatchError,
    Rng,
    check_close,
    is_plain,
    operation,
    unmerged,
)
from tests.histories.subjects import BASE, NAMES, VECTORS

HALF = torch.bfloat16


@operation(2)
def set_mode(case: Case, rng: Rng) -> None:
    """`train()` or `eval()`."""
    case.shadow.training = bool(rng.random() < 0.5)
    case.model.train(case.shadow.training)


@operation(2)
def run_in_autocast(case: Case, rng: Rng) -> None:
    """A forward in half precision, recorded or not."""
    x = case.inputs(rng)
    tolerance = max(OUTPUTS[case.shadow.coarsest], OUTPUTS[HALF])
    with torch.autocast("cpu", HALF), torch.no_grad() if rng.random() < 0.5 else nullcontext():
        check_close(case.model(x), case.shadow.outputs(x), tolerance, "outputs in autocast")


@operation(2, unmerged)
def backward(case: Case, rng: Rng) -> None:
    """A pass and its gradients, some of it inside autocast."""
    forward_in, backward_in = rng.random() < 0.3, rng.random() < 0.3
    x = case.inputs(rng).clone().requires_grad_()
    with torch.autocast("cpu", HALF, enabled=bool(forward_in)):
        y = case.model(x)
    gradient = drawn_like(rng, y.shape, y.dtype)
    # PyTorch's own backward of `split` knows no float16 within autocast for bfloat16.
    backward_in = backward_in and not any(p.dtype == torch.float16 for p in case.model.parameters() if p.requires_grad)
    with torch.autocast("cpu", HALF, enabled=bool(backward_in)):
        y.backward(gradient)
    expected = case.shadow.backward(x, gradient)
    coarse = HALF if forward_in or backward_in else case.shadow.coarsest
    tolerance = max(GRADIENTS[coarse], GRADIENTS[case.shadow.coarsest])
    of_x = expected.pop("x")
    check_close(x.grad, of_x.value, tolerance, "gradient of x", of_x.size)
    case.add_gradients(expected, tolerance)


@operation(1)
def zero_grad(case: Case, rng: Rng) -> None:
    """All gradients."""
    case.model.zero_grad()
    case.shadow.gradients.clear()


@operation(2, unmerged)
def optimizer_step(case: Case, rng: Rng) -> None:
    """Along the gradients that are there, with one of torch's optimizers."""
    ways = ({"foreach": False}, {"foreach": True}, {"fused": True})
    kind = [torch.optim.SGD, torch.optim.AdamW][int(rng.integers(2))]
    way = ways[int(rng.integers(3))]
    rate, damping = 0.02, 0.1
    names = [name for name in case.shadow.gradients if name in case.shadow.trained]
    if not names:
        return
    if any(case.parameter(name).dtype.itemsize < 4 for name in names):
        way = ways[0]  # torch 2.13's fused SGD leaves most values of a bfloat16 tensor on a CPU as they are
    options = {"eps": damping, "weight_decay": 0.0} if kind is torch.optim.AdamW else {}
    kind([case.parameter(name) for name in names], lr=rate, **options, **way).step()
    for name in names:
        gradient, held = case.shadow.gradients[name], case.parameter(name)
        adam = kind is torch.optim.AdamW
        change = gradient.value / (gradient.value.abs() + damping) if adam else gradient.value
        slack = rate * gradient.size / (damping if adam else 1)
        slack += 4 * torch.finfo(held.dtype).eps * float(held.detach().abs().max())
        check_close(held, case.shadow[name] - rate * change, 1, f"{name} after {kind.__name__}", slack)
        case.shadow[name] = held


def _usual(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _without_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def _in_inference_mode(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return layer(x)


def _under_vmap(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(layer)(x)


def _as_a_function(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))


SEEN: list[Callable[[nn.Module, Tensor], Tensor]] = [_usual, _usual, _without_gradients, _as_a_function]
UNSEEN: list[Callable[[nn.Module, Tensor], Tensor]] = [_under_vmap, _in_inference_mode]
"""Forwards of which a layer keeps nothing: the explicit backward refuses them or is right."""


@operation(3, is_plain)
def explicit_backward(case: Case, rng: Rng) -> None:
    """`DVoRAAdapter.backward` after a forward of the layer, in various circumstances."""
    name = NAMES[int(rng.integers(3))]
    layer, shadow = case.layer(name), case.shadow.of_layer(name)
    shape = (5, case.settings.sizes[name][0])
    if rng.random() < 0.5:
        layer(drawn_like(rng, shape, case.shadow.dtype))
    x = drawn_like(rng, shape, case.shadow.dtype)
    run = [*SEEN, *UNSEEN][int(rng.integers(len(SEEN) + len(UNSEEN)))]
    backward_in = [nullcontext, torch.no_grad, lambda: torch.autocast("cpu", HALF)][int(rng.integers(3))]
    y = run(layer, x)
    check_close(y.clone(), shadow.outputs(x), OUTPUTS[shadow.coarsest], f"outputs of {name}")
    gradient = drawn_like(rng, y.shape, y.dtype)
    try:
        with backward_in():
            gradient_of_x = layer.backward(gradient)
    except RuntimeError as error:
        if run in UNSEEN and "backward needs a forward before it" in str(error):
            return
        raise
    expected = shadow.backward(x, gradient)
    tolerance = GRADIENTS[shadow.coarsest]
    of_x = expected.pop("x")
    check_close(gradient_of_x, of_x.value, tolerance, f"gradient of the inputs of {name}", of_x.size)
    if layer.freeze_base_layer:
        expected = {name: found for name, found in expected.items() if name.rpartition(".")[2] in VECTORS}
    case.add_gradients(expected, tolerance)


@operation(1, is_plain)
def update_parameters(case: Case, rng: Rng) -> None:
    """A step of one layer along its gradients."""
    name, rate = NAMES[int(rng.integers(3))], 0.02
    values = VECTORS if case.layer(name).freeze_base_layer else (*VECTORS, *BASE)
    names = [each for each in case.shadow.gradients if each in {f"{name}.{value}" for value in values}]
    if not case.shadow.trained.intersection(names):
        return
    case.layer(name).update_parameters(rate)
    for each in names:
        gradient, held = case.shadow.gradients.pop(each), case.parameter(each)
        if each in case.shadow.trained:
            slack = rate * gradient.size + 4 * torch.finfo(held.dtype).eps * float(held.detach().abs().max())
            check_close(held, case.shadow[each] - rate * gradient.value, 1, f"{each} after update_parameters", slack)
            case.shadow[each] = held


@operation(1)
def run_with_another_default_device(case: Case, rng: Rng) -> None:
    """All tensors of the pass are on the CPU, so its outputs are; then and afterwards, in a new thread or in this."""
    x, recorded, failed = case.inputs(rng), bool(rng.random() < 0.3), []

    def run() -> None:
        try:
            for device in ("meta", "cpu"):
                with torch.device(device), torch.set_grad_enabled(recorded):
                    y = case.model(x)
                if y.device.type != "cpu":
                    raise MismatchError(f"outputs of inputs on the CPU are on {y.device}")
                check_close(
                    y, case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], f"outputs, {device} is the default"
                )
        except Exception as error:
            failed.append(error)

    elsewhere(run) if rng.random() < 0.8 else run()
    if failed:
        raise failed[0]


@operation(1)
def run_with_another_default_dtype(case: Case, rng: Rng) -> None:
    """It matters for no tensor that has one."""
    x, before = case.inputs(rng), torch.get_default_dtype()
    torch.set_default_dtype([torch.float64, torch.bfloat16, torch.float16][int(rng.integers(3))])
    try:
        with torch.set_grad_enabled(bool(rng.random() < 0.5)):
            y = case.model(x)
    finally:
        torch.set_default_dtype(before)
    check_close(y, case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], "outputs with another default dtype")


@operation(2)
def refill_inputs_between_siblings(case: Case, rng: Rng) -> None:
    """The second layer reads what is in the inputs when it is called; the next pass, also what came there uncounted."""
    shape = (3, case.settings.width)
    x, other = (drawn_like(rng, shape, case.shadow.dtype) for _ in range(2))
    before = x.clone()
    counted = [lambda: x.copy_(other), lambda: setattr(x, "data", other.clone())]
    ways = [*counted, lambda: x.data.copy_(other)]
    if x.dtype not in (torch.bfloat16,):
        ways.append(lambda: x.numpy().__setitem__(..., other.numpy()))
    way = int(rng.integers(len(ways)))
    refill = ways[way]

    def hook(*_: object) -> None:
        refill()

    handle = case.layer("first").register_forward_hook(hook)
    try:
        with torch.no_grad():
            y = case.model(x)
    finally:
        handle.remove()
    expected = case.shadow.outputs(before, other)
    if way < len(counted):
        check_close(y, expected, OUTPUTS[case.shadow.coarsest], "outputs with inputs refilled between siblings")
    with torch.no_grad():
        y = case.model(x)
    check_close(y, case.shadow.outputs(other), OUTPUTS[case.shadow.coarsest], "outputs after inputs were refilled")


CIRCUMSTANCES: list[Callable[[], AbstractContextManager[object]]] = [
    nullcontext,
    torch.no_grad,
    torch.inference_mode,
    lambda: torch.autocast("cpu", HALF),
]


@operation(1)
def siblings_in_other_circumstances(case: Case, rng: Rng) -> None:
    """Two layers read the same inputs, each in its own way."""
    for number in rng.permutation(len(CIRCUMSTANCES) ** 2)[:6]:
        x = drawn_like(rng, (4, case.settings.width), case.shadow.dtype).requires_grad_(bool(rng.random() < 0.5))
        for index, name in zip(divmod(number, len(CIRCUMSTANCES)), ("first", "second"), strict=True):
            with CIRCUMSTANCES[index]():
                y = case.layer(name)(x)
            dtype = HALF if index == 3 else case.shadow.coarsest
            tolerance = max(OUTPUTS[dtype], OUTPUTS[case.shadow.coarsest])
            check_close(y.detach().clone(), case.shadow.of_layer(name).outputs(x), tolerance, f"outputs of {name}")


@operation(1, unmerged)
def checkpointed(case: Case, rng: Rng) -> None:
    """A pass whose forward runs again for its backward."""
    x = case.inputs(rng).clone().requires_grad_()
    y = checkpoint(case.model, x, use_reentrant=False)
    gradient = drawn_like(rng, y.shape, y.dtype)
    y.backward(gradient)
    expected, tolerance = case.shadow.backward(x, gradient), GRADIENTS[case.shadow.coarsest]
    of_x = expected.pop("x")
    check_close(x.grad, of_x.value, tolerance, "gradient of x through a checkpoint", of_x.size)
    case.add_gradients(expected, tolerance)


@operation(1)
def run_under_vmap(case: Case, rng: Rng) -> None:
    """And as a function of parameters."""
    x = drawn_like(rng, (4, case.settings.width), case.shadow.dtype)
    run = [_under_vmap, _as_a_function][int(rng.integers(2))]
    check_close(
        run(case.model, x), case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], "outputs of a transformed pass"
    )


@operation(1, unmerged)
def inputs_are_let_go(case: Case, rng: Rng) -> None:
    """After a pass and its backward nothing keeps the inputs."""
    x = drawn_like(rng, (3, case.settings.width), case.shadow.dtype).requires_grad_()
    kept = StorageWeakRef(x.untyped_storage())
    y = case.model(x)
    torch.autograd.grad(y.sum(), x)
    del x, y
    if not kept.expired():
        raise MismatchError("the inputs are kept after the backward pass")


@operation(1, is_plain)
def reset_state(case: Case, rng: Rng) -> None:
    """Of one layer: gradients are forgotten."""
    name = NAMES[int(rng.integers(3))]
    values = VECTORS if case.layer(name).freeze_base_layer else (*VECTORS, *BASE)
    case.layer(name).reset_state()
    for value in values:
        case.shadow.gradients.pop(f"{name}.{value}", None)
