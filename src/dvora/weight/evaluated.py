"""The gain and scale of an evaluated weight, kept for as long as nothing that they depend on changes.

On the CPU the values themselves are compared, which no way of writing them escapes. On other devices that would wait
for the device in every pass: there, what PyTorch counts is compared, and a pass that trains drops what is kept.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..engines.imported import imported_class
from ..method.functional import RowFactors


class State(NamedTuple):
    """Equal states mean equal values, but for writes through `tensor.data`, which PyTorch does not count.

    Of a tensor that FSDP2 frees and gathers again nothing is counted: no state of one that may be is equal.
    """

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
        storage, layout = StorageWeakRef(tensor.untyped_storage()), (tensor.shape, tensor.stride())
        return cls(storage, tensor.data_ptr(), version_of(tensor), *layout, tensor.dtype, tensor.device)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is still in this state; of one made in inference mode nobody can tell."""
        return self.is_of_same(tensor) and tensor.data_ptr() == self.address and not _may_be_gathered(tensor)

    def is_of_same(self, tensor: Tensor) -> bool:
        """Whether this is a state of the same tensor, without a write that PyTorch counted, wherever it is now."""
        return (
            not tensor.is_inference()
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and tensor._version == self.version
            and tensor.dtype == self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.device == self.device
        )


class LastFactors:
    """The row factors of the last evaluation."""

    def __init__(self) -> None:
        # One attribute, so that threads find both of one evaluation.
        self._kept: _Kept | None = None

    def of(
        self, inputs: Sequence[Tensor], weight: Tensor | None, compute: Callable[[Sequence[Tensor]], RowFactors]
    ) -> RowFactors:
        """What `compute` gives, or gave for the same inputs and weight.

        Args:
            inputs: tensors that the factors depend on.
            weight: the base's, or None.
            compute: makes the factors from such inputs.
        """
        kept = self._kept
        if kept is not None and kept.serves(inputs, weight):
            return kept.factors
        # Factors made in inference mode could not be used in a pass that trains something else.
        with torch.inference_mode(False), torch.no_grad():
            # Before they are read, and read once: another thread may write to them while the factors are made.
            known = [tensor.detach().clone() if tensor.device.type == "cpu" else State.of(tensor) for tensor in inputs]
            state = None if weight is None else State.of(weight)
            read = [copy if isinstance(copy, Tensor) else own for own, copy in zip(inputs, known, strict=True)]
            kept = _Kept(compute(read), known, state)
        self._kept = kept if kept.serves(inputs, weight) else None
        return kept.factors

    def drop(self) -> None:
        """Forget everything."""
        self._kept = None

    def __reduce__(self) -> tuple[type["LastFactors"], tuple[()]]:
        return LastFactors, ()


class _Kept(NamedTuple):
    """Factors, and what they were made from."""

    factors: RowFactors
    inputs: list[Tensor | State]
    weight: State | None

    def serves(self, inputs: Sequence[Tensor], weight: Tensor | None) -> bool:
        """Whether nothing has changed."""
        if (weight is None) != (self.weight is None) or len(inputs) != len(self.inputs):
            return False
        if weight is not None and self.weight is not None and not self.weight.is_of(weight):
            return False
        return all(map(_unchanged, inputs, self.inputs))


def version_of(tensor: Tensor) -> int:
    """The number of writes that PyTorch has counted; of tensors made in inference mode it counts none."""
    return -1 if tensor.is_inference() else tensor._version


_never_gathered: "WeakValueDictionary[int, Tensor]" = WeakValueDictionary()


def note_never_gathered(tensor: Tensor) -> None:
    """Note that FSDP2 has not made this tensor: it puts tensors of its own in the places of those that it gathers."""
    _never_gathered[id(tensor)] = tensor


def _may_be_gathered(tensor: Tensor) -> bool:
    """Whether FSDP2 may have made the tensor; for every type that is given to `fully_shard` there is a class."""
    fsdp_module = imported_class("torch.distributed.fsdp", "FSDPModule")
    if fsdp_module is None or not fsdp_module.__subclasses__():
        return False
    return _never_gathered.get(id(tensor)) is not tensor


def _count_step(optimizer: torch.optim.Optimizer, _: object, __: object) -> None:
    """Let PyTorch count an optimizer's step as a change: fused ones, and those of other packages, do not."""
    if not torch.compiler.is_compiling():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version([p for p in parameters if p.grad is not None and not p.is_inference()])


def _unchanged(tensor: Tensor, known: Tensor | State) -> bool:
    if isinstance(known, State):
        return known.is_of(tensor)
    return tensor.is_cpu and tensor.dtype == known.dtype and torch.equal(tensor, known)


register_optimizer_step_post_hook(_count_step)
