"""The model under examination: called on its inputs, and restored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..dense_rebuild import Subject

Inputs = Mapping[str, Any] | Tensor
"""Keyword arguments of the model's forward, or its only argument."""
Loss = Callable[[Any], Tensor]
"""Of the model's outputs."""
ROWS = 8
"""Rows of a layer's input that are kept for comparisons."""


class CannotCheckError(Exception):
    """A check cannot be made on this model, for the reason that it says."""


@dataclass(frozen=True)
class Examined:
    """A model, and what it does with its inputs.

    Args:
        model, inputs, loss, optimizer: as `examine` got them.
        layers: all adapted ones.
        some: those that are checked one by one.
        outputs: of the model.
        layer_inputs: a few rows of the inputs of each layer that was called, by its name.
    """

    model: PeftModel
    inputs: Inputs
    loss: Loss | None
    optimizer: torch.optim.Optimizer | None
    layers: tuple[Subject, ...]
    some: tuple[Subject, ...]
    outputs: Tensor
    layer_inputs: Mapping[str, Tensor]

    @property
    def adapter(self) -> str:
        """The name of the active adapter.

        Raises:
            CannotCheckError: there are several.
        """
        if len(self.model.active_adapters) != 1:
            raise CannotCheckError("several adapters are active at once")
        return self.model.active_adapters[0]

    def output(self, **more: Any) -> Tensor:
        """The model's main output as it is now."""
        return tensors_of(called(self.model, self.inputs, **more))[0]

    def trained(self) -> dict[str, nn.Parameter]:
        """What the model trains; of one that was loaded to be used, the vectors of its adapter."""
        named = {name.removeprefix("base_model.model."): value for name, value in self.model.named_parameters()}
        if trained := {name: value for name, value in named.items() if value.requires_grad}:
            return trained
        own = {id(value) for layer in self.layers for term in layer.terms for value in term.parameters.values()}
        return {name: value for name, value in named.items() if id(value) in own}


def called(model: nn.Module, inputs: Inputs, **more: Any) -> Any:
    """The outputs of a model."""
    return model(**inputs, **more) if isinstance(inputs, Mapping) else model(inputs, **more)


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of numbers among a model's outputs, logits first.

    Raises:
        TypeError: there is none.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    named = dict(outputs) if isinstance(outputs, Mapping) else dict(enumerate(outputs))
    ordered = [named[name] for name in sorted(named, key=lambda name: name != "logits")]
    found = [value for value in ordered if isinstance(value, Tensor) and value.dim() and value.is_floating_point()]
    if not found:
        raise TypeError(f"the model returned a {type(outputs).__name__} without a tensor of numbers")
    return found


def recorded(model: nn.Module, inputs: Inputs, layers: tuple[Subject, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output, and a few rows of the inputs of each layer that was called, by its name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: seen.update({name: seen.get(name, arguments[0].detach()[:ROWS].clone())})

    handles = [subject.layer.register_forward_pre_hook(keep(subject.name)) for subject in layers]
    try:
        return tensors_of(called(model, inputs))[0].detach(), seen
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
    switches = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    tensors = [*model.parameters(), *model.buffers()] if values else []
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
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
        for tensor, copy in zip(tensors, copies, strict=True):
            if not torch.equal(tensor.cpu(), copy):
                tensor.copy_(copy)
