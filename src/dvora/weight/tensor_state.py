"""Whether tensors have changed since a result was computed from them: row factors, norm constants.

PyTorch's version counters tell, with the storage and its address. Not seen are writes through `tensor.data` or NumPy.

FSDP2 frees weights between passes and gathers them again without counting a version, so a version proves nothing there,
and samples of the values are compared: two passes over the weight, in place of the product for the constants.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..engines.fsdp2 import may_be_gathered
from ..ops.annotations import Float
from ..ops.dtypes import norm_dtype
from ..ops.tracing import version_of


class TensorVersion(NamedTuple):
    """Equal versions mean equal values, except for writes through `tensor.data` or NumPy, which PyTorch does not count.

    FSDP2 gathers again without counting versions: for a tensor that it may have gathered no version is equal.
    """

    storage: StorageWeakRef
    """A weak reference: it keeps no memory alive, but no other storage can get its identity."""
    address: int
    version: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorVersion":
        """The current version of a tensor."""
        storage, layout = StorageWeakRef(tensor.untyped_storage()), (tensor.shape, tensor.stride())
        return cls(storage, tensor.data_ptr(), version_of(tensor), *layout, tensor.dtype, tensor.device)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is still the tensor's version. Inference tensors have no version: always stale."""
        return self.is_of_same(tensor) and tensor.data_ptr() == self.address and not may_be_gathered(tensor)

    def is_of_same(self, tensor: Tensor) -> bool:
        """Whether this is a version of the same tensor, without a counted write, at whatever address it is now."""
        return (
            not tensor.is_inference()
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and tensor._version == self.version
            and tensor.dtype == self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
            and tensor.device == self.device
        )


class SameTensor:
    """Whether a tensor is the same object, at the same address, without a write that PyTorch counts.

    Quicker than `TensorVersion`, which also knows the tensor behind another object. Inference tensors have no version,
    and FSDP2 gathers again without counting: they are never the same.

    Args:
        tensor: as it is now; it is not kept alive.
    """

    __slots__ = ("_address", "_dtype", "_storage", "_stride", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        unknown = tensor.is_inference() or may_be_gathered(tensor)
        self._tensor: Callable[[], Tensor | None] = (lambda: None) if unknown else weakref.ref(tensor)
        # Held weakly, so that no other storage gets its identity.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._version, self._address = version_of(tensor), tensor.data_ptr()
        self._stride, self._dtype = tensor.stride(), tensor.dtype

    def tensor(self) -> Tensor | None:
        """The tensor as it is now, if it still exists."""
        return self._tensor()

    def is_same(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, perhaps changed."""
        return tensor is self._tensor()

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, unchanged."""
        return (
            tensor is self._tensor()
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
            and tensor.untyped_storage()._cdata == self._storage.cdata
            # `tensor.data` may have become another view of the same memory.
            and tensor.stride() == self._stride
            and tensor.dtype == self._dtype
        )


def same_or_none(tensor: Tensor | None) -> SameTensor | None:
    """None for None."""
    return None if tensor is None else SameTensor(tensor)


def is_unchanged(known: SameTensor | None, tensor: Tensor | None) -> bool:
    """Whether it is the known tensor, unchanged; None is none."""
    return known is None if tensor is None else known is not None and known.is_of(tensor)


def _count_step(optimizer: torch.optim.Optimizer, _: object, __: object) -> None:
    """Count an optimizer's step as a write: fused optimizers, and those of other packages, do not."""
    if not torch.compiler.is_compiling():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.autograd.graph.increment_version([p for p in parameters if p.grad is not None and not p.is_inference()])


register_optimizer_step_post_hook(_count_step)


class WeightVersion:
    """The version of a weight that constants were computed from, and a sample of its values once it is gathered again.

    Args:
        weight: the weight that constants were computed from.
        gathered_again: whether it had been freed and gathered before.
    """

    def __init__(self, weight: Tensor, gathered_again: bool = False) -> None:
        self._state = TensorVersion.of(weight)
        self._sample = _sample(weight) if gathered_again else None

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight still has this version."""
        return self._state.is_of(weight)

    def was_written_to(self, weight: Tensor) -> bool:
        """Whether PyTorch has counted a write since."""
        return self._state.version != version_of(weight)

    def was_gathered_again(self, weight: Tensor) -> bool:
        """Whether the weight is the same tensor at another address, perhaps with other values."""
        return self._state.is_of_same(weight)

    def has_values_of(self, weight: Tensor) -> bool:
        """Whether a weight that was gathered again has the same values; if so, take its current version."""
        if self._sample is None or not torch.equal(self._sample, _sample(weight)):
            return False
        self._state = TensorVersion.of(weight)
        return True


@torch.no_grad()
def _sample(weight: Tensor) -> Float[Tensor, "2 O"]:
    """The norm of every row, and its product with one fixed vector, which differs for other signs and places."""
    rows = weight.detach().flatten(1)
    # Multiples of an irrational number, so that no two columns get the same weight.
    fixed = torch.frac(torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float32) * 0.6180339887)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=norm_dtype(rows.dtype))
    return torch.stack([norms, (rows @ (fixed - 0.5).to(rows.dtype)).to(norms.dtype)])
