"""The stored values of A and B: no more than layers have needed, on every device that asks for them.

Each stream of values goes on without end in both directions, so what is stored for one layer is a corner of what a
larger one needs. A layer of a high rank and another one of many inputs each have a rectangle of their own, unless one
for both holds no more values.

Dimensions: R rank, N the inputs or outputs of a layer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .shapes import Float
from .transforms import transforming

Make = Callable[[int, int, int], np.ndarray]
"""The values (rows, columns) of a stream, float32, from the stream, rows and columns."""


class DenseStore(nn.Module):
    """Buffers outside the state dict that follow device moves, ignore casts and are made again after the meta device.

    Args:
        make: makes values.
        exact: whether values for one size are no part of those for another.
    """

    def __init__(self, make: Make, exact: bool) -> None:
        super().__init__()
        self._make = make
        self._exact = exact
        self._sizes: dict[int, list[tuple[int, int]]] = {}
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def values(self, stream: int, rank: int, size: int, device: torch.device | None = None) -> Float[Tensor, "R N"]:
        """The unscaled values of a stream for a layer: a view of what is stored."""
        sizes = self._sizes.setdefault(stream, [])
        for rows, columns in sizes:
            if (rows, columns) == (rank, size) or (rows >= rank and columns >= size and not self._exact):
                return self._on(_name(stream, rows, columns), device)[:rank, :size]
        rows, columns = rank, size
        for held in () if self._exact else sizes:
            joint = max(rows, held[0]), max(columns, held[1])
            if joint[0] * joint[1] <= rows * columns + held[0] * held[1]:
                rows, columns = joint
        first = next(iter(self._buffers.values()), None)
        home = first.device if first is not None else None if device is None or device.type == "meta" else device
        self.register_buffer(_name(stream, rows, columns), self._made(stream, rows, columns, home), persistent=False)
        sizes.append((rows, columns))
        for held in [held for held in sizes[:-1] if held[0] <= rows and held[1] <= columns and not self._exact]:
            sizes.remove(held)
            del self._buffers[_name(stream, *held)]
        return self._on(_name(stream, rows, columns), device)[:rank, :size]

    def kept(self, name: str, make: Callable[[], Tensor], device: torch.device | None = None) -> Tensor:
        """Something else that follows from the values, made once; not to be written to."""
        if name not in self._buffers:
            self.register_buffer(name, make(), persistent=False)
        return self._on(name, device)

    def stored(self) -> dict[str, Tensor]:
        """All values, by names that begin with `stream_0` or `stream_1`."""
        return {name: buffer for name, buffer in self.named_buffers() if name.startswith("stream_")}

    def _on(self, name: str, device: torch.device | None) -> Tensor:
        """A buffer on a device: itself, or a copy that is kept for the other layers there."""
        buffer = self.get_buffer(name)
        if device is None or buffer.device == device:
            return buffer
        if transforming():
            return buffer.to(device)
        source, copied = self._copies.get((name, device), (None, buffer))
        if source is not buffer:
            with torch.inference_mode(False):
                copied = buffer.to(device)
            self._copies[name, device] = buffer, copied
        return copied

    def _made(self, stream: int, rows: int, columns: int, device: torch.device | None) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(self._make(stream, rows, columns)).to(device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DenseStore":
        # Only the device is taken from `fn`, asked with an empty tensor: casts would round the matrices, and
        # `to_empty` would leave them undefined.
        for name, stored in list(self._buffers.items()):
            assert stored is not None
            device = fn(stored.new_empty(0)).device
            if not stored.is_meta or device.type == "meta":
                self._buffers[name] = stored.to(device)
            elif name.startswith("stream_"):
                rows, columns = stored.shape
                self._buffers[name] = self._made(int(name.split("_")[1]), rows, columns, device)
            else:
                del self._buffers[name]
        self._copies.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


def _name(stream: int, rows: int, columns: int) -> str:
    return f"stream_{stream}_{rows}x{columns}"
