"""Reused buffers: page faults in fresh memory cost more than most of what is computed in it."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .tracing import is_batched, is_traced

_LARGEST = 2**20
"""Values of the largest buffer that is kept, one for each name, dtype and thread."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that the next caller with the same name overwrites, so no result may be a view of it.

    It is fresh memory while PyTorch traces, on devices other than the CPU (PyTorch caches their memory itself), and
    above `_LARGEST` values.

    Args:
        name: of the use; two buffers in use at the same time need two names.
        shape, dtype, device: of the tensor.
    """
    values = math.prod(shape)
    if values > _LARGEST or device.type != "cpu" or is_traced():
        return torch.empty(*shape, dtype=dtype, device=device)
    buffer = _kept.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < values:
        with torch.inference_mode(False):
            buffer = _kept.buffers[name, dtype] = torch.empty(values, dtype=dtype, device=device)
    return buffer[:values].view(*shape)


def out(name: str, shape: Sequence[int], like: Tensor) -> Tensor | None:
    """`scratch` for an operation's `out`; None, which means fresh memory, while operations are recorded or traced."""
    # The legacy vmap, for batched gradients, does not support `out`.
    if torch.is_grad_enabled() or is_traced() or is_batched(like):
        return None
    return scratch(name, shape, like.dtype, like.device)
