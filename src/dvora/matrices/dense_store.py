"""Storage for the values of A and B: only as many as layers have needed, with a copy for every device in use.

Each stream is unbounded in both directions, so the values for one layer are the upper left corner of those for a larger
one. A layer of a high rank and one of many inputs are stored as two rectangles, unless one rectangle for both takes no
more memory.

Dimensions: R rank, N the inputs or outputs of a layer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.annotations import Float
from ..ops.tracing import is_traced

Make = Callable[[int, int, int], np.ndarray]
"""The values (rows, columns) of a stream, float32, from the stream, rows and columns."""


class DenseStore(nn.Module):
    """Buffers outside the state dict: they follow device moves, ignore casts and are made again after the meta device.

    Args:
        make: makes values.
    """

    def __init__(self, make: Make) -> None:
        super().__init__()
        self._make = make
        self._copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._names: dict[tuple[int, int, int], str] = {}
        """The buffer that holds the values of a stream, rank and size."""

    def values(self, stream: int, rank: int, size: int, device: torch.device | None = None) -> Float[Tensor, "R N"]:
        """The unscaled values of a stream for a layer: a view of what is stored."""
        name = self._names.get((stream, rank, size), "")
        buffer = self._buffers.get(name)
        if buffer is None:
            name, buffer = self._find_or_make(stream, rank, size, device)
            self._names[stream, rank, size] = name
        return self._on(name, buffer, device)[:rank, :size]

    def _find_or_make(self, stream: int, rank: int, size: int, device: torch.device | None) -> tuple[str, Tensor]:
        prefix = f"stream_{stream}_"
        held = [(name, buffer) for name, buffer in self._made() if name.startswith(prefix)]
        for name, buffer in held:
            rows, columns = buffer.shape
            if rows >= rank and columns >= size:
                return name, buffer
        rows, columns = rank, size
        for _, buffer in held:
            joint = max(rows, buffer.shape[0]), max(columns, buffer.shape[1])
            if joint[0] * joint[1] <= rows * columns + buffer.numel():
                rows, columns = joint
        first = next((buffer for _, buffer in self._made()), None)
        home = first.device if first is not None else None if device is None or device.type == "meta" else device
        name, made = f"{prefix}{rows}x{columns}", self._make_on(stream, rows, columns, home)
        self.register_buffer(name, made, persistent=False)
        for smaller, buffer in held:
            if buffer.shape[0] <= rows and buffer.shape[1] <= columns:
                self._buffers.pop(smaller, None)
        return name, made

    def kept(self, name: str, make: Callable[[], Tensor], device: torch.device | None = None) -> Tensor:
        """Anything else computed from the values, once; not to be written to."""
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = make()
            if is_traced():
                # A traced graph cannot register any.
                return buffer if device is None else buffer.to(device)
            self.register_buffer(name, buffer, persistent=False)
        return self._on(name, buffer, device)

    def stored(self) -> dict[str, Tensor]:
        """All values by stream, `stream_0` and `stream_1`, with their sizes in the name where a stream has several."""
        named = {name: buffer for name, buffer in self._made() if name.startswith("stream_")}
        streams = [name.rpartition("_")[0] for name in named]
        return {
            stream if streams.count(stream) == 1 else name: buffer
            for stream, (name, buffer) in zip(streams, named.items(), strict=True)
        }

    def _made(self) -> list[tuple[str, Tensor]]:
        """All buffers by name, as a list, since another thread may add one."""
        return [(name, buffer) for name, buffer in list(self._buffers.items()) if buffer is not None]

    def _on(self, name: str, buffer: Tensor, device: torch.device | None) -> Tensor:
        """A buffer on a device: itself, or a copy, cached for all layers there."""
        if device is None or buffer.device == device:
            return buffer
        if is_traced():
            return buffer.to(device)
        source, copied = self._copies.get((name, device), (None, buffer))
        if source is not buffer:
            with torch.inference_mode(False):
                copied = buffer.to(device)
            self._copies[name, device] = buffer, copied
        return copied

    def _make_on(self, stream: int, rows: int, columns: int, device: torch.device | None) -> Tensor:
        with torch.inference_mode(False):
            return torch.from_numpy(self._make(stream, rows, columns)).to(device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DenseStore":
        # Follow only the device of `fn`, found with an empty tensor: a cast would round the matrices, and `to_empty`
        # would leave them undefined.
        for name, stored in self._made():
            device = fn(stored.new_empty(0)).device
            if not stored.is_meta or device.type == "meta":
                self._buffers[name] = stored.to(device)
            elif name.startswith("stream_"):
                rows, columns = stored.shape
                self._buffers[name] = self._make_on(int(name.split("_")[1]), rows, columns, device)
            else:
                del self._buffers[name]
        self._copies.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}
