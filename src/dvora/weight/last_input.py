"""The input of a layer's last forward pass, for its explicit backward pass.

A running layer cannot know whether its caller will use `backward` or autograd. So it keeps the input until autograd's
backward pass reaches the layer, and not at all where surrounding code manages what is saved.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..ops.dtypes import autocast_dtype, full_precision
from ..ops.tracing import saving_intercepted, version_of

_adding = threading.Lock()


class Pass(NamedTuple):
    """A forward pass: its input, and the state that must be unchanged when the input is used again."""

    x: Tensor
    autocast_dtype: torch.dtype | None
    """None: autocast was off."""
    state: list[tuple[Tensor, int]]
    """Versions of the input and the parameters."""

    def gradients(
        self, outputs: Callable[[Tensor], Tensor], output_gradient: Tensor, trained: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradients with respect to the input and the trained parameters; None for those that were not used.

        Args:
            outputs: runs the layer again.
            output_gradient: with respect to its outputs.
            trained: parameters that require gradients.
        """
        device = self.x.device
        with torch.inference_mode(False), torch.enable_grad():
            # Autograd cannot record inference tensors.
            x = (self.x.clone() if self.x.is_inference() else self.x.detach()).requires_grad_()
            with torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
                y = outputs(x)
            with full_precision(device):
                return torch.autograd.grad(y, [x, *trained], output_gradient.to(y.dtype), allow_unused=True)

    def is_of(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are the parameters of the pass, and neither they nor the input were written to since."""
        now = _state(self.x, parameters)
        return len(now) == len(self.state) and all(
            tensor is known and version == before
            for (tensor, version), (known, before) in zip(now, self.state, strict=True)
        )


class LastInput:
    """The last pass of every thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def of_this_thread(self, parameters: Iterable[Tensor]) -> Pass:
        """The last pass of this thread, if it can still be run again.

        Args:
            parameters: all those of the layer.

        Raises:
            RuntimeError: none is kept, or the input or a parameter was written to since.
        """
        slot: _Slot | None = getattr(self._local, "slot", None)
        last = None if slot is None else slot.last
        if last is None:
            raise RuntimeError(
                "backward needs a forward before it: call the layer in training mode first, in this thread, neither "
                "compiled nor checkpointed; one forward serves one backward, the explicit one or autograd's"
            )
        if not last.is_of(parameters):
            raise RuntimeError("the input or a parameter was changed since the last forward: call the layer again")
        return last

    def keep(self, x: Tensor, y: Tensor, parameters: Iterable[Tensor]) -> None:
        """Keep the input of a pass, unless surrounding code manages what is saved.

        Args:
            x: the input.
            y: the output.
            parameters: all those of the layer.
        """
        if saving_intercepted():
            return
        x = x.detach()
        slot = self._local.slot = _Slot(Pass(x, autocast_dtype(x.device), _state(x, parameters)))
        if y.grad_fn is not None:
            slot.empty_before(y.grad_fn)

    def forget(self) -> None:
        """Forget this thread's last pass."""
        self._local.slot = None

    def __reduce__(self) -> tuple[type["LastInput"], tuple[()]]:
        return LastInput, ()


class _Slot:
    """Holds a pass until the backward pass, which may run in another thread, empties it."""

    def __init__(self, last: Pass) -> None:
        self.last: Pass | None = last

    def empty_before(self, node: Node) -> None:
        """Empty the slot when autograd's backward pass reaches a node."""
        # Weak, so that a graph that is never run backward does not keep what the layer has forgotten.
        own = weakref.ref(self)

        def empty(_: object) -> None:
            if (slot := own()) is not None:
                slot.last = None

        node.register_prehook(empty)


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add to `.grad`, under a lock, since other threads may do so too."""
    with torch.inference_mode(False), _adding:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _state(x: Tensor, parameters: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    return [(tensor, version_of(tensor)) for tensor in (x, *parameters)]
