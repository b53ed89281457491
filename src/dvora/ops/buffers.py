"""Memory that is used again: fresh memory costs more than most of what is computed in it, in page faults."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .tracing import is_traced

_LARGEST = 2**20
"""Values that are kept at most, of each name, dtype and thread."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any values, which the next caller of the same name overwrites: no result may be a view of it.

    Fresh where PyTorch transforms the code, on devices whose memory PyTorch keeps itself, and where it is large.

    Args:
        name: of its use; two tensors that are in use at once need two names.
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
    """`scratch` for an operation's `out`; None, for fresh memory, while operations are recorded or transformed."""
    # The older vmap, of gradients in batches, knows no `out`.
    if torch.is_grad_enabled() or is_traced() or torch._C._functorch.is_legacy_batchedtensor(like):
        return None
    return scratch(name, shape, like.dtype, like.device)
