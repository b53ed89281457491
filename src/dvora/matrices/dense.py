"""The frozen matrices A and B as matrices of independent uniform entries.

Dimensions: *T tokens, I in, O out, R rank, N either of I and O.

    A (R, I): row k of A is row k of stream 0, cut to I columns and scaled by sqrt(2 / I)
    B (O, R): column k of B is row k of stream 1, cut to O values and scaled by sqrt(2 / R)

Both have the entry variance of Kaiming uniform, 2 / fan_in. Streams are unbounded in both directions, and the scale
depends on the layer's size alone, so layers of any size and adapters of any rank use the same values (VeRA, arXiv
2310.11454).
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from ..tensors import Float, as_dtype, autocast_dtype, norm_dtype, times
from . import philox
from .base import Constant, Matrices, Side

_STREAM: dict[Side, int] = {"A": 0, "B": 1}
_ENTRY_VARIANCE = 1 / 3
"""Of unscaled values, uniform on (-1, 1)."""


class DenseMatrices(Matrices):
    """A and B of independent values: kept for every size and dtype in use, with `G = A A^T` for the squares."""

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        A: Tensor = self._constant("A", rank, in_features, dtype, index.device)
        return A[:, index].movedim(0, -1)

    def fingerprint_values(self) -> np.ndarray:
        """Some values, (2, 8, 16), float32."""
        return np.stack([self._unscaled(side, 8, 16) for side in _STREAM])

    def _narrow(self, side: Side, x: Float[Tensor, "*T N"], rank: int) -> Float[Tensor, "*T R"]:
        x = _as_autocast(x)
        M: Tensor = self._constant(side, rank, x.shape[-1], x.dtype, x.device)
        return times(x, M.T)

    def _widen(self, side: Side, z: Float[Tensor, "*T R"], size: int) -> Float[Tensor, "*T N"]:
        z = _as_autocast(z)
        M: Tensor = self._constant(side, z.shape[-1], size, z.dtype, z.device)
        return times(z, M)

    def _needed(
        self, rank: int, in_features: int, out_features: int, dtype: torch.dtype, values: bool
    ) -> Iterable[Constant]:
        for each in dict.fromkeys((norm_dtype(dtype), dtype)):
            yield "A", rank, in_features, each
            yield "B", rank, out_features, each
        if rank <= in_features:
            yield "G", rank, in_features, norm_dtype(dtype)

    def _whole(self, side: Side, rank: int, total: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        values = torch.from_numpy(self._unscaled(side, rank, total))
        return values.to(dtype) * self._scale(total if side == "A" else rank)

    def _unscaled(self, side: Side, rank: int, size: int) -> np.ndarray:
        """The values (rank, size) of a stream, float32: a pure function of seed, stream, row and column."""
        return np.stack([philox.uniform_row(self.seed, _STREAM[side], row, size) for row in range(rank)])

    def _scale(self, fan_in: int) -> float:
        return math.sqrt(2 / fan_in / _ENTRY_VARIANCE)


def _as_autocast(x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T N"]:
    """x in the dtype in which autocast multiplies, so that the matrix is taken in it and not cast in every pass."""
    # The quick question first, which also suits devices without autocast.
    if x.dtype == torch.float64 or not torch._C._is_any_autocast_enabled():
        return x
    return as_dtype(x, autocast_dtype(x.device) or x.dtype)
