"""Small questions to PyTorch and its engines: dtypes, versions, whether code is traced, what holds a tensor's values.

Whatever asks whether an engine (DTensor, FSDP2, DeepSpeed ZeRO-3) is there looks into `sys.modules`: importing one
takes seconds.

Trained vectors and norms stay in float32 or wider, whatever a model is cast to: gains differ from one by as little as
1e-6, and bfloat16 would round them by up to 4e-3.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Stands in for `jaxtyping.Float`, which only tests install: `Float[Tensor, "O I"]` is just `Tensor`."""

            def __class_getitem__(cls, item):
                return item[0]


__all__ = [
    "Float",
    "TensorVersion",
    "as_dtype",
    "at_least_float32",
    "autocast_dtype",
    "bias_of",
    "full_precision",
    "gathers_uncounted",
    "grad_recorded",
    "is_dtensor",
    "is_fully_sharded",
    "is_in_memory",
    "is_partitioned",
    "is_traced",
    "local",
    "norm_dtype",
    "saved_tensors_are_hooked",
    "times",
    "times_apart",
    "version_of",
    "weight_in_memory",
    "without_autocast",
]

Backward = TypeVar("Backward", bound=Callable[..., Any])

# Looked up once: every layer asks several times a pass.
_is_tracing, _is_transforming = torch._C._is_tracing, torch._C._are_functorch_transforms_active
_dispatch_modes, _dispatch_mode = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_mode
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, gains and vectors for a weight of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, skipped where nothing changes: the call takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def times(x: Float[Tensor, "*T N"], matrix: Float[Tensor, "N M"]) -> Float[Tensor, "*T M"]:
    """`x matrix` as one product of two matrices: of batches out of order, as attention has, PyTorch would make many."""
    return (x.contiguous() if x.dim() > 2 else x) @ matrix


def times_apart(rows: Float[Tensor, "*N K"], matrix: Float[Tensor, "K M"]) -> Float[Tensor, "*N M"]:
    """`rows matrix`, of one row or of N, each by itself: so it gets the same bits alone as among others."""
    if rows.dim() == 1:
        return rows @ matrix
    return torch.bmm(rows[:, None], matrix.expand(len(rows), *matrix.shape))[:, 0]


def at_least_float32(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a function for `nn.Module._apply` so that it casts to float32 at the least; device moves are unchanged."""

    def guarded(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        if changed.is_floating_point() and changed.dtype.itemsize < 4:
            return tensor.to(changed.device, torch.float32)
        return changed

    return guarded


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for `device`: a norm is never computed in half precision."""
    # Entering a context of autocast takes as long as a small product.
    return torch.autocast(device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()


def without_autocast(backward: Backward) -> Backward:
    """Run the backward pass of an autograd function with autocast off, in the dtypes of its forward pass.

    PyTorch does the same for its own operations.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Any) -> Any:
        for gradient in gradients:
            if gradient is not None:
                with full_precision(gradient.device):
                    return backward(ctx, *gradients)
        return backward(ctx, *gradients)

    return cast(Backward, guarded)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on `device`; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def is_traced() -> bool:
    """Whether the code is compiled, exported or traced, or runs under `torch.func` or forward-mode differentiation.

    PyTorch must then see every operation, and nothing may be kept from one pass to the next.
    """
    return (
        torch.compiler.is_compiling()
        or _is_tracing()
        or _is_transforming()
        or forward_ad._current_level >= 0
        or (_dispatch_modes() > 0 and (_dispatch_mode(_PROXY) is not None or _dispatch_mode(_FAKE) is not None))
    )


def grad_recorded() -> bool:
    """Whether operations are recorded for a backward pass."""
    # Compilers cannot ask for inference mode.
    return torch.is_grad_enabled() and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())


def saved_tensors_are_hooked() -> bool:
    """Whether hooks take what autograd saves, as checkpointing that is not reentrant and offloading do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def version_of(tensor: Tensor) -> int:
    """PyTorch's version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


class TensorVersion(NamedTuple):
    """One state of a tensor: equal versions mean equal values, but for writes that PyTorch does not count.

    Not counted are writes through `tensor.data` or NumPy.
    """

    storage: StorageWeakRef
    """A weak reference: it keeps no memory alive, but no other storage can get its identity."""
    address: int
    version: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorVersion":
        """The present state of a tensor."""
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.data_ptr(), version_of(tensor), tensor.shape, tensor.stride(), tensor.dtype)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether this is still the tensor's state. Inference tensors have no version: always stale."""
        return (
            not tensor.is_inference()
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
            and tensor.untyped_storage()._cdata == self.storage.cdata
            and tensor.dtype == self.dtype
            and tensor.shape == self.shape
            and tensor.stride() == self.stride
        )


def is_dtensor(weight: Tensor | None) -> bool:
    """Whether the weight is a DTensor: every process holds a shard of it."""
    if type(weight) in (Tensor, nn.Parameter, type(None)):
        return False
    # Without an import, which takes time that processes without DTensors should not spend.
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return dtensor is not None and isinstance(weight, dtensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all processes; any other tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


@overload
def local(tensor: Tensor) -> Tensor: ...
@overload
def local(tensor: None) -> None: ...
def local(tensor: Tensor | None) -> Tensor | None:
    """This process's shard of a DTensor; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[union-attr]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has wrapped a module, whose parameters it gathers for each pass."""
    fsdp_module = _fsdp_module()
    return fsdp_module is not None and isinstance(module, fsdp_module)


def gathers_uncounted() -> bool:
    """Whether FSDP2 has wrapped any module: it gathers values into the same tensors without counting a version."""
    fsdp_module = _fsdp_module()
    # `fully_shard` derives a class from the type of every module that it wraps.
    return fsdp_module is not None and bool(fsdp_module.__subclasses__())


def _fsdp_module() -> type | None:
    """FSDP2's class of wrapped modules; None where it was never imported."""
    found: type | None = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return found


def is_partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 manages the weight, so that it is empty except while it is gathered."""
    # Compilers cannot read attributes of a tensor.
    return not torch.compiler.is_compiling() and "ds_id" in vars(weight)


def is_in_memory(weight: Tensor) -> bool:
    """Whether a weight can be read in every pass; a trained one can, since ZeRO-3 gathers it on access to the layer."""
    return not weight.is_meta and (weight.requires_grad or not is_partitioned(weight))


def weight_in_memory(layer: nn.Module, parameter_name: str) -> Tensor | None:
    """The weight of a layer if it can be read in every pass.

    It is looked up in the layer's parameters, since attribute access would make ZeRO-3 gather a frozen weight.

    Args:
        layer: the layer with the weight.
        parameter_name: the weight's name in it.
    """
    kept = None if torch.compiler.is_compiling() else layer._parameters.get(parameter_name)
    if kept is not None and not is_in_memory(kept):
        return None
    weight = getattr(layer, parameter_name)
    assert isinstance(weight, Tensor), type(weight)
    return weight


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have a module run another forward, within its hooks; gives what takes that back, unless it was replaced since."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward

    def give_back() -> None:
        if vars(module).get("forward") is forward:
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before

    return give_back


def bias_of(layer: nn.Module, measured: Float[Tensor, "O"] | None) -> Float[Tensor, "O"] | None:
    """The bias of a layer: its own, or the one measured where the layer hides it or is offloaded."""
    bias = getattr(layer, "bias", None)
    return local(bias) if isinstance(bias, Tensor) and not bias.is_meta else measured
