"""Trained vectors and norm constants stay in float32 or wider, whatever a model is cast to.

Gains differ from one by as little as 1e-6; bfloat16 would round them by up to 4e-3.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., Any])


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, gains and vectors for a weight of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, skipped where nothing changes: the call takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def at_least_float32(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap a function for `nn.Module._apply` so that it casts to float32 at the least; device moves are unchanged."""

    def guarded(tensor: Tensor) -> Tensor:
        changed = change(tensor)
        if changed.is_floating_point() and changed.dtype.itemsize < 4:
            return tensor.to(changed.device, torch.float32)
        return changed

    return guarded


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast is off for `device`: a norm is never computed in half precision."""
    return torch.autocast(device.type, enabled=False)


def without_autocast(backward: Backward) -> Backward:
    """Run the backward pass of an autograd function with autocast off, in the dtypes of its forward pass.

    PyTorch does the same for its own operations.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: Any) -> Any:
        device = next((gradient.device for gradient in gradients if gradient is not None), None)
        if device is None or not torch.is_autocast_enabled(device.type):
            # Entering a context takes as long as a small product.
            return backward(ctx, *gradients)
        with full_precision(device):
            return backward(ctx, *gradients)

    return cast(Backward, guarded)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast computes on `device`; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
