"""The gain and scale of an evaluated weight, kept for as long as nothing that they depend on changes.

On the CPU the values themselves are compared, which no way of writing them escapes. On other devices that would wait
for the device in every pass: there, what PyTorch counts is compared, and a pass that trains drops what is kept.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .shapes import Float


class State(NamedTuple):
    """Equal states mean equal values, but for what PyTorch does not count: writes through `tensor.data`, and those to
    tensors that were made in inference mode."""

    storage: StorageWeakRef
    """Weak, so that it keeps no memory, but no other storage can come to have its identity."""
    address: int
    version: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "State":
        """The state of a tensor now."""
        version = -1 if tensor.is_inference() else tensor._version
        storage = StorageWeakRef(tensor.untyped_storage())
        layout = tensor.shape, tensor.stride()
        return cls(storage, tensor.data_ptr(), version, *layout, tensor.dtype, tensor.device)


class RowFactors(NamedTuple):
    """What the outputs of one adapted weight are rescaled with."""

    gain_minus_one: Float[Tensor, "O"]
    """`s (g - 1)`, s the adapter's strength."""
    scale: Float[Tensor, "O"]
    """`s g beta`."""
    beta: Float[Tensor, "O"]
    """That of the update itself."""


class LastFactors:
    """The row factors of the last evaluation."""

    def __init__(self) -> None:
        # One attribute, so that threads find both of one evaluation.
        self._kept: tuple[tuple[object, ...], RowFactors] | None = None

    def of(self, inputs: Sequence[Tensor], weight_state: object, compute: Callable[[], RowFactors]) -> RowFactors:
        """What `compute` gives, or gave for the same inputs.

        Args:
            inputs: tensors that the factors depend on.
            weight_state: changes with the weight.
            compute: makes the factors.
        """
        kept = self._kept
        if kept is not None and _same(inputs, weight_state, *kept[0]):
            return kept[1]
        # Factors made in inference mode could not be used in a pass that trains something else.
        with torch.inference_mode(False), torch.no_grad():
            factors = compute()
        self._kept = (weight_state, *map(_fixed, inputs)), factors
        return factors

    def drop(self) -> None:
        """Forget everything."""
        self._kept = None

    def __reduce__(self) -> tuple[type["LastFactors"], tuple[()]]:
        return LastFactors, ()


def _same(inputs: Sequence[Tensor], weight_state: object, known_weight: object, *known: object) -> bool:
    return known_weight == weight_state and len(known) == len(inputs) and all(map(_unchanged, inputs, known))


def _fixed(tensor: Tensor) -> Tensor | State:
    """Something to compare the tensor with later."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else State.of(tensor)


def _unchanged(tensor: Tensor, known: object) -> bool:
    if isinstance(known, State):
        # PyTorch does not count the changes of inference tensors.
        return not tensor.is_inference() and State.of(tensor) == known
    assert isinstance(known, Tensor)
    same_kind = tensor.device == known.device and tensor.dtype == known.dtype
    return same_kind and torch.equal(tensor, known)
