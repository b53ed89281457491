"""The checks after every operation: values, gradients and outputs of a model against its shadow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.histories.operations import GRADIENTS, OUTPUTS, Case, MismatchError, Rng, check_close, check_same
from tests.histories.shadow import Shadow
from tests.histories.subjects import parameter


def check(case: Case, rng: Rng) -> None:
    """Everything, in one of several orders, because what is looked at first may hide what comes after."""
    check_values(case.model, case.shadow)
    ways = [check_outputs, check_gradients, check_in_inference_mode]
    for index in rng.permutation(3)[: int(rng.integers(1, 4))]:
        ways[index](case, rng)
    for number, (model, shadow) in enumerate(case.left):
        check_values(model, shadow)
        x = drawn_like(rng, (3, case.settings.width), shadow.dtype)
        with torch.no_grad():
            check_close(model(x), shadow.outputs(x), OUTPUTS[shadow.coarsest], f"outputs of the copied model {number}")


def check_values(model: nn.Module, shadow: Shadow) -> None:
    """Parameters to the last bit, their dtypes, what is trained, and what they have for gradients."""
    for name in shadow.names():
        held = parameter(model, name)
        if held.dtype != shadow.dtype_of(name):
            raise MismatchError(f"{name} has dtype {held.dtype}, expected {shadow.dtype_of(name)}")
        if held.requires_grad != (name in shadow.trained):
            raise MismatchError(f"{name}.requires_grad is {held.requires_grad}")
        if name.endswith(".weight") and shadow.is_merged:
            merged = shadow.layers[name.partition(".")[0]].merged
            check_close(held, merged, OUTPUTS[shadow.coarsest], f"merged {name}")
        else:
            check_same(held, shadow[name], name)
        gradient = shadow.gradients.get(name)
        if (held.grad is None) != (gradient is None):
            raise MismatchError(f"{name}.grad is {'missing' if held.grad is None else 'there'}")
        if gradient is not None:
            check_close(held.grad, gradient.value, 1, f"{name}.grad", gradient.size)


def check_outputs(case: Case, rng: Rng) -> None:
    """Without gradients."""
    x = case.inputs(rng)
    with torch.no_grad():
        check_close(case.model(x), case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], "outputs under no_grad")


def check_in_inference_mode(case: Case, rng: Rng) -> None:
    """In inference mode."""
    x = case.inputs(rng)
    with torch.inference_mode():
        y = case.model(x)
    check_close(y.clone(), case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], "outputs in inference mode")


def check_gradients(case: Case, rng: Rng) -> None:
    """Outputs and gradients of a pass that is recorded, or its refusal; `.grad` is left alone."""
    x = case.inputs(rng).clone().requires_grad_()
    if case.trains_nothing:
        try:
            case.model(x)
        except RuntimeError as error:
            if "adapters are merged" in str(error):
                return
            raise
        raise MismatchError("a pass that would train merged adapters is recorded without a word")
    y = case.model(x)
    check_close(y, case.shadow.outputs(x), OUTPUTS[case.shadow.coarsest], "outputs with gradients")
    output_gradient = drawn_like(rng, y.shape, y.dtype)
    expected = case.shadow.backward(x, output_gradient)
    held = [x if name == "x" else case.parameter(name) for name in expected]
    found = torch.autograd.grad(y, held, output_gradient)
    for (name, (value, size)), gradient in zip(expected.items(), found, strict=True):
        check_close(gradient, value, GRADIENTS[case.shadow.coarsest], f"gradient of {name}", size)


def drawn_like(rng: Rng, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal values."""
    return torch.from_numpy(np.asarray(rng.normal(size=tuple(shape)))).to(dtype)
