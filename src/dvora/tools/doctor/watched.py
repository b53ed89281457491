"""The model under examination: called on its inputs, observed with hooks, and restored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..dense_rebuild import Subject

Inputs = Mapping[str, Any] | Tensor
"""Keyword arguments of the model's forward, or its only argument."""
Loss = Callable[[Any], Tensor]
"""Of the model's outputs."""
ROWS = 8
"""Rows of a layer's input that are kept for comparisons."""


def called(model: nn.Module, inputs: Inputs, **more: Any) -> Any:
    """The outputs of the model."""
    return model(**inputs, **more) if isinstance(inputs, Mapping) else model(inputs, **more)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of numbers among a model's outputs, logits first.

    Raises:
        TypeError: there is none.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    ordered = sorted(named, key=lambda name: name != "logits")
    found = [each for each in map(named.__getitem__, ordered) if isinstance(each, Tensor) and each.dim()]
    found = [each for each in found if each.is_floating_point()]
    if not found:
        raise TypeError(f"the model returned a {type(outputs).__name__} without a tensor of numbers")
    return found


def tensor_of(outputs: Any) -> Tensor:
    """The main tensor among a model's outputs: logits where there are any, else the first of floats."""
    return tensors_of(outputs)[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """`||found - expected|| / ||expected||` in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    size = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(found - expected) / torch.where(size > 0, size, 1.0))


@torch.no_grad()
def recorded(model: nn.Module, inputs: Inputs, every: tuple[Subject, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output, and a few rows of the inputs of each layer that was called, by its name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen.setdefault(name, arguments[0].detach()[:ROWS].clone())

        return hook

    handles = [subject.layer.register_forward_pre_hook(keep(subject.name)) for subject in every]
    try:
        return tensor_of(called(model, inputs)).detach(), seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def restored(model: nn.Module, values: bool = False) -> Iterator[None]:
    """Leave a model with the modes, gradients and switches that it had.

    Args:
        model: in evaluation mode inside.
        values: put the values of all parameters and buffers back too, from a copy on the CPU.
    """
    modes = {module: module.training for module in model.modules()}
    switches = {each: (each.requires_grad, each.grad) for each in model.parameters()}
    kept = [(each, each.detach().to("cpu", copy=True)) for each in _tensors(model)] if values else []
    try:
        for parameter in switches:
            parameter.grad = None
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (trained, gradient) in switches.items():
            parameter.requires_grad_(trained)
            parameter.grad = gradient
        with torch.no_grad():
            for each, value in kept:
                if not torch.equal(each.cpu(), value):
                    each.copy_(value)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
