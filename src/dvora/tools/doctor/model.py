"""The model under examination: called on its inputs, restored, and what its file gives in a fresh process."""

import copy
import logging
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
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
_START = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
"""As new as a spawned process; who examines many adapters can have imports made once (`set_forkserver_preload`)."""


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
        vectors = {id(value) for layer in self.layers for term in layer.terms for value in term.parameters.values()}
        return {name: value for name, value in named.items() if id(value) in vectors}


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
    tensors = [value for value in ordered if isinstance(value, Tensor) and value.dim() and value.is_floating_point()]
    if not tensors:
        raise TypeError(f"the model returned a {type(outputs).__name__} without a tensor of numbers")
    return tensors


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


def outputs_of_the_file(examined: Examined) -> Tensor:
    """The outputs of the adapter, saved and loaded by another process onto a copy of the base.

    Raises:
        CannotCheckError: several adapters are active, or the base cannot be copied.
    """
    adapter = examined.adapter
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        examined.model.save_pretrained(str(folder / "saved"), selected_adapters=[adapter])
        named = folder / "saved" / adapter
        try:
            torch.save(copy.deepcopy(examined.model).unload(), folder / "base.pt")
        except (pickle.PicklingError, AttributeError, TypeError, ValueError, NotImplementedError) as problem:
            raise CannotCheckError(f"the base cannot be handed to another process: {problem}") from problem
        torch.save(examined.inputs, folder / "inputs.pt")
        saved = named if named.is_dir() else folder / "saved"
        # What packages say at their import has been said by this process.
        with ProcessPoolExecutor(1, get_context(_START), logging.disable, (logging.WARNING,)) as fresh:
            return fresh.submit(_loaded_outputs, folder, saved, torch.get_num_threads()).result()


def _loaded_outputs(folder: Path, saved: Path, threads: int) -> Tensor:
    import dvora

    assert dvora.__version__  # importing it makes the method known to PEFT
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    base = torch.load(folder / "base.pt", weights_only=False)
    inputs = torch.load(folder / "inputs.pt", weights_only=False)
    model = PeftModel.from_pretrained(base, str(saved)).eval()
    with torch.no_grad():
        return tensors_of(called(model, inputs))[0].cpu()
