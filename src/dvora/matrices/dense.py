"""The frozen matrices A and B of independent uniform entries: what they are, and the products with them.

Dimensions: *T any leading dimensions, I in, O out, N either, R rank, N adapters. M (R, N) is A on side "A"
and the transpose of B on side "B", so that all four products are two, `x M^T` and `z M`.

    A (R, I): row k of A is row k of stream 0, cut to I columns and scaled by sqrt(2 / I)
    B (O, R): column k of B is row k of stream 1, cut to O values and scaled by sqrt(2 / R)

Both have the entry variance of Kaiming uniform, 2 / fan_in. Streams are unbounded in both directions, and the scale
depends on the layer's size alone, so layers of any size and adapters of any rank use the same values (VeRA, arXiv
2310.11454). Each size, dtype and device is made once and kept as a constant; it is no buffer, so no cast, state dict,
broadcast or file touches it.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..tensors import Float, as_dtype, autocast_dtype, full_precision, is_traced, norm_dtype, times
from . import philox

Side = Literal["A", "B"]
_STREAM: dict[Side, int] = {"A": 0, "B": 1}
_ENTRY_VARIANCE = 1 / 3
"""Of unscaled values, uniform on (-1, 1)."""
_CPU = torch.device("cpu")
_AT_ONCE = 2**24
"""Squares of N adapters are taken together up to this many values: beyond, one product each keeps a CPU busy."""


class Shard(NamedTuple):
    """Which features of a weight one process holds under tensor parallelism: `start` to `stop` of `total`."""

    start: int
    stop: int
    total: int

    def of(self, tensor: Tensor) -> Tensor:
        """This process's values along the last dimension, as a view."""
        return tensor[..., self.start : self.stop]


class Matrices(nn.Module):
    """A and B of one seed for layers of every size and rank.

    Products are plain operations on constants: differentiable any number of times, and nothing of a token is saved.

    Args:
        seed: names the matrices, 0 <= seed < 2**64.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._shards: dict[Side, Shard | None] = {"A": None, "B": None}
        self._parts: dict[tuple[Shard | None, Shard | None], Matrices] = {}
        self._constants: dict[tuple[str, int, int, torch.dtype, torch.device], Tensor] = {}
        """By name (a side, or "G"), rank, size, dtype and device."""
        self._reserved: dict[tuple[int, int, int, torch.dtype], None] = {}
        """Sizes of `reserve`, in order."""
        self._home = _CPU
        """The device for which `reserve` makes constants: where the module was last moved to."""

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`, in the dtype of `x`; under autocast in autocast's."""
        return self._narrow("A", x, rank)

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`, in the dtype of `h`, as `project`."""
        return self._widen("A", h, in_features)

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        """`z B^T`, in the dtype of `z`, as `project`."""
        return self._widen("B", z, out_features)

    def expand_transpose(self, d: Float[Tensor, "*T O"], rank: int) -> Float[Tensor, "*T R"]:
        """`d B`, in the dtype of `d`, as `project`."""
        return self._narrow("B", d, rank)

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """`onehot(index) A^T`, for `index` (*T): columns of A, without reading the others."""
        return self.matrix("A", rank, in_features, dtype, index.device)[:, index].movedim(0, -1)

    def values(
        self, side: Side, rank: int, size: int, dtype: torch.dtype, device: torch.device = _CPU
    ) -> Float[Tensor, "R N"]:
        """A, or B transposed, made now."""
        kept = self._constants.get((side, rank, size, dtype, _CPU))
        return (self._values(side, rank, size, dtype) if kept is None else kept.clone()).to(device)

    def matrix(
        self, side: Side, rank: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> Float[Tensor, "R N"]:
        """A, or B transposed, kept and not to be written to."""
        return self._constant(side, rank, size, dtype, device)

    def update(
        self, lambda_d: Float[Tensor, "R"], in_features: int, out_features: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "O I"]:
        """`B diag(lambda_d) A`, with rows times a scale, for a lambda_d in float32 or float64 and in its dtype."""
        rank, where = len(lambda_d), (lambda_d.dtype, lambda_d.device)
        rows = self.matrix("B", rank, out_features, *where).T * lambda_d
        return (rows if scale is None else rows * scale[:, None]) @ self.matrix("A", rank, in_features, *where)

    def squares(self, lambda_d: Float[Tensor, "*N R"], in_features: int, out_features: int) -> Float[Tensor, "*N O"]:
        """`q = ||B diag(lambda_d) A||_row**2`, for a lambda_d in float32 or float64 and in its dtype."""
        rank = lambda_d.shape[-1]
        if lambda_d.dim() > 1 and (rank > in_features or lambda_d.numel() * out_features > _AT_ONCE):
            return torch.stack([self.squares(adapter, in_features, out_features) for adapter in lambda_d])
        with full_precision(lambda_d.device):
            if rank > in_features:
                return self.update(lambda_d, in_features, out_features).square().sum(1)
            return (lambda_d.unsqueeze(-2) @ self._half_gradients(lambda_d, in_features, out_features)).squeeze(-2)

    def squares_gradient(
        self, d_half_q: Float[Tensor, "*N O"], lambda_d: Float[Tensor, "*N R"], in_features: int
    ) -> Float[Tensor, "*N R"]:
        """The gradient of `(d_half_q * squares / 2).sum()` with respect to lambda_d, exact."""
        rank = lambda_d.shape[-1]
        if lambda_d.dim() > 1 and (rank > in_features or rank * d_half_q.numel() > _AT_ONCE):
            adapters = zip(d_half_q, lambda_d, strict=True)
            return torch.stack([self.squares_gradient(*adapter, in_features) for adapter in adapters])
        with full_precision(lambda_d.device):
            if rank > in_features:
                out_features, where = d_half_q.shape[-1], (lambda_d.dtype, lambda_d.device)
                d_update = d_half_q[:, None] * self.update(lambda_d, in_features, out_features)
                products = d_update @ self.matrix("A", rank, in_features, *where).T
                return (products * self.matrix("B", rank, out_features, *where).T).sum(0)
            half = self._half_gradients(lambda_d, in_features, d_half_q.shape[-1])
            return (half @ d_half_q.unsqueeze(-1)).squeeze(-1)

    def of_shard(self, inputs: Shard | None, outputs: Shard | None) -> "Matrices":
        """The columns of A and the rows of B of one process; sizes are then those of its shard."""
        if inputs is None and outputs is None:
            return self
        part = self._parts.get((inputs, outputs))
        if part is None:
            shards: dict[Side, Shard | None] = {"A": inputs, "B": outputs}
            part = self._twin(_shards=shards, _constants={}, _reserved={}, _parts={})
            self._parts[inputs, outputs] = part
        return part

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Make now what passes in `dtype` and their norms need.

        Required before tracing or compiling, since values are made outside a graph.
        """
        self._reserved[rank, in_features, out_features, dtype] = None
        for each in dict.fromkeys((norm_dtype(dtype), dtype)):
            self._constant("A", rank, in_features, each, self._home)
            self._constant("B", rank, out_features, each, self._home)
        if rank <= in_features:
            self._constant("G", rank, in_features, norm_dtype(dtype), self._home)

    def fingerprint_values(self) -> np.ndarray:
        """Some values, (2, 8, 16), float32, for the fingerprint."""
        return np.stack([self._unscaled(side, 8, 16) for side in _STREAM])

    def extra_repr(self) -> str:
        return f"seed={self.seed}"

    def _narrow(self, side: Side, x: Float[Tensor, "*T N"], rank: int) -> Float[Tensor, "*T R"]:
        """`x M^T`, for M of a side."""
        x = _as_autocast(x)
        return times(x, self.matrix(side, rank, x.shape[-1], x.dtype, x.device).T)

    def _widen(self, side: Side, z: Float[Tensor, "*T R"], size: int) -> Float[Tensor, "*T N"]:
        """`z M`."""
        z = _as_autocast(z)
        return times(z, self.matrix(side, z.shape[-1], size, z.dtype, z.device))

    def _whole(self, side: Side, rank: int, total: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        """M of all processes together from the seed, in float32 or float64, on the CPU."""
        values = torch.from_numpy(self._unscaled(side, rank, total))
        return values.to(dtype) * self._scale(total if side == "A" else rank)

    def _unscaled(self, side: Side, rank: int, size: int) -> np.ndarray:
        """The values (rank, size) of a stream, float32: a pure function of seed, stream, row and column."""
        return np.stack([philox.uniform_row(self.seed, _STREAM[side], row, size) for row in range(rank)])

    def _scale(self, fan_in: int) -> float:
        return math.sqrt(2 / fan_in / _ENTRY_VARIANCE)

    def _made(self, name: str, rank: int, size: int, dtype: torch.dtype) -> Tensor:
        """A constant in float32 or float64, on the CPU, from the seed: M of a side, or `G = A A^T`."""
        if name == "G":
            A = self._whole("A", rank, size, torch.float64)
            return (A @ A.T).to(dtype)
        return self._values("A" if name == "A" else "B", rank, size, dtype)

    def _values(self, side: Side, rank: int, size: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        """M of this process, new, on the CPU."""
        M, shard = self._whole(side, rank, self._total(side, size), norm_dtype(dtype)), self._shards[side]
        return (M if shard is None else shard.of(M).contiguous()).to(dtype)

    def _half_gradients(
        self, lambda_d: Float[Tensor, "*N R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*N R O"]:
        """Half the gradients of q by lambda_d, `(G diag(lambda_d) B^T) * B^T` for `G = A A^T`."""
        rank, dtype, device = lambda_d.shape[-1], lambda_d.dtype, lambda_d.device
        G = self._constant("G", rank, in_features, dtype, device)
        Bt = self.matrix("B", rank, out_features, dtype, device)
        # In place: the product is as large as B for every layer, and fresh memory takes as long as the product.
        return ((G * lambda_d.unsqueeze(-2)) @ Bt).mul_(Bt)

    def _constant(self, name: str, rank: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is kept under a name, not to be written to."""
        key = name, rank, size, dtype, device
        constant = self._constants.get(key)
        if constant is None:
            with torch.inference_mode(False), torch.no_grad():
                constant = self._new(*key)
            # What is made while PyTorch traces belongs to that graph.
            if not is_traced():
                self._constants[key] = constant
        return constant

    def _new(self, name: str, rank: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu":
            return self._constant(name, rank, size, dtype, _CPU).to(device)
        if dtype != norm_dtype(dtype):
            return self._constant(name, rank, size, norm_dtype(dtype), _CPU).to(dtype)
        return self._made(name, rank, size, dtype)

    def _total(self, side: Side, size: int) -> int:
        """Of all processes together, where this one has `size`."""
        shard = self._shards[side]
        return size if shard is None else shard.total

    def _twin(self, **changed: Any) -> "Matrices":
        twin: Matrices = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, **changed)
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Matrices":
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._home)).device
        if device.type == "meta":
            self._constants, self._parts = {}, {}
        elif device != self._home or not self._constants:
            self._home, self._parts = device, {}
            self._constants = {key: constant for key, constant in self._constants.items() if key[-1] == _CPU}
            # At once, so that a compiled pass finds them.
            self._reserve_again()
        return self

    def _reserve_again(self) -> None:
        for sizes in [*self._reserved]:
            self.reserve(*sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matrices":
        # Constants are never written to, so copies may share them.
        return self._twin(_constants=dict(self._constants), _parts={}, _reserved=dict(self._reserved))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": {}, "_parts": {}, "_home": _CPU}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reserve_again()


def _as_autocast(x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T N"]:
    """x in the dtype in which autocast multiplies, so that the matrix is taken in it and not cast in every pass."""
    # The quick question first, which also suits devices without autocast.
    if x.dtype == torch.float64 or not torch._C._is_any_autocast_enabled():
        return x
    return as_dtype(x, autocast_dtype(x.device) or x.dtype)
