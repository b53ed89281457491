"""Operations that run the model: forwards, backwards, steps, and the circumstances that they run in."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from tests.histories.checks import drawn_like
from tests.histories.operations import GRADIENTS, OUTPUTS, Case, Rng, check_close, is_plain, operation, unmerged
from tests.histories.subjects import NAMES, VECTORS

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
    options = {"eps": damping, "weight_decay": 0.0} if kind is torch.optim.AdamW else {}
    kind([case.parameter(name) for name in names], lr=rate, **options, **way).step()
    for name in names:
        gradient, held = case.shadow.gradients[name], case.parameter(name)
        adam = kind is torch.optim.AdamW
        change = gradient.value / (gradient.value.abs() + damping) if adam else gradient.value
        slack = rate * gradient.size / (damping if adam else 1)
        slack += 4 * torch.finfo(held.dtype).eps * float(held.abs().max())
        check_close(held, case.shadow[name] - rate * change, 1, f"{name} after {kind.__name__}", slack)
        case.shadow[name] = held


@operation(2, is_plain)
def explicit_backward(case: Case, rng: Rng) -> None:
    """`DVoRAAdapter.backward` after a forward of the layer, in various circumstances."""
    name = NAMES[int(rng.integers(3))]
    layer, shadow = case.layer(name), case.shadow.of_layer(name)
    x = drawn_like(rng, (5, case.settings.sizes[name][0]), case.shadow.dtype)
    forward_in = [nullcontext, torch.no_grad, torch.inference_mode][int(rng.integers(3))]
    backward_in = [nullcontext, torch.no_grad, lambda: torch.autocast("cpu", HALF)][int(rng.integers(3))]
    with forward_in():
        y = layer(x)
    check_close(y.clone(), shadow.outputs(x), OUTPUTS[shadow.coarsest], f"outputs of {name}")
    gradient = drawn_like(rng, y.shape, y.dtype)
    with backward_in():
        gradient_of_x = layer.backward(gradient)
    expected = shadow.backward(x, gradient)
    tolerance = GRADIENTS[shadow.coarsest]
    of_x = expected.pop("x")
    check_close(gradient_of_x, of_x.value, tolerance, f"gradient of the inputs of {name}", of_x.size)
    if layer.freeze_base_layer:
        expected = {name: found for name, found in expected.items() if name.rpartition(".")[2] in VECTORS}
    case.add_gradients(expected, tolerance)
