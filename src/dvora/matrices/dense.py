"""The frozen matrices A and B as stored matrices of independent uniform entries.

Dimensions: T tokens, I in, O out, R rank.

    A (R, I): row k of A is row k of stream 0, cut to I columns and scaled by sqrt(2 / I)
    B (O, R): column k of B is row k of stream 1, cut to O values and scaled by sqrt(2 / R)

Both have the entry variance of Kaiming uniform, 2 / fan_in. The scale depends on the layer's size and is not stored,
so layers of any size and adapters of any rank use the same values (VeRA, arXiv 2310.11454).
"""

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.annotations import Float
from ..ops.buffers import out
from ..ops.dtypes import as_dtype, norm_dtype, without_autocast
from ..ops.tracing import grad_recorded, is_traced
from . import philox
from .dense_store import DenseStore, Make
from .shard import Shard

_STREAM_A, _STREAM_B = 0, 1
_ENTRY_VARIANCE = 1 / 3
"""Of the stored values, uniform on (-1, 1)."""
_KEPT_BYTES = 3 * 2**20
"""Keep `half_dq` for the backward pass up to this size; else recompute it, which costs little beside the outputs."""
_CHUNK_VALUES = 2**18
"""Values of a weight that are projected at a time."""
_FEW_TOKENS = 16
"""Up to this many tokens, scale separately."""


def keeps_half_dq(rank: int, out_features: int, dtype: torch.dtype) -> bool:
    """Whether a step keeps a layer's `half_dq` for its backward pass."""
    return rank * out_features * dtype.itemsize <= _KEPT_BYTES


def uniform_values(seed: int, stream: int, rows: int, columns: int) -> np.ndarray:
    """The unscaled values (rows, columns) of a stream, float32: a pure function of seed, stream, row and column."""
    return np.stack([philox.uniform_row(seed, stream, row, columns) for row in range(rows)])


class DenseMatrices(nn.Module):
    """A and B of one seed, stored as large as any layer so far has needed.

    Args:
        seed: names the matrices.
        make: makes the unscaled values; None means `uniform_values`.
        use_triton: whether outputs on CUDA are combined by the Triton kernel.
    """

    products_are_cheap = False

    def __init__(self, seed: int, make: Make | None = None, use_triton: bool = False) -> None:
        super().__init__()
        self.seed = seed
        self.use_triton = use_triton
        self._make = make or partial(uniform_values, seed)
        self.store = DenseStore(self._make)
        self._shards: dict[int, Shard | None] = {}

    def of_shard(self, inputs: Shard | None, outputs: Shard | None) -> "DenseMatrices":
        """The columns of A and the rows of B of one process, as views; sizes are then those of its shard."""
        # A shallow copy shares the store.
        shard = copy.copy(self)
        shard._shards = {_STREAM_A: inputs, _STREAM_B: outputs}
        return shard

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Make the matrices for a layer now, so that no forward pass has to."""
        self._stored(_STREAM_A, rank, in_features)
        self._stored(_STREAM_B, rank, out_features)
        if rank <= in_features:
            self.gram(rank, in_features, dtype)

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`, in the dtype of `x`."""
        A = self._stored(_STREAM_A, rank, x.shape[-1], x.device)
        return scaled_product(x, A.T, self._scale(self._fan_in(x.shape[-1])))

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`, in the dtype of `h`."""
        A = self._stored(_STREAM_A, h.shape[-1], in_features, h.device)
        return scaled_product(h, A, self._scale(self._fan_in(in_features)))

    def expand(
        self, z: Float[Tensor, "*T R"], out_features: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "*T O"]:
        """`(z B^T) * scale`, in the dtype of `z`."""
        rank = z.shape[-1]
        B = self._stored(_STREAM_B, rank, out_features, z.device)
        if scale is not None and z.numel() > rank**2:
            # With more tokens than ranks it is cheaper to scale the matrix.
            return scaled_product(z, _scaled(B, scale), self._scale(rank))
        outputs = scaled_product(z, B, self._scale(rank))
        return outputs if scale is None else outputs * as_dtype(scale, z.dtype)

    def expand_transpose(
        self, d: Float[Tensor, "*T O"], rank: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "*T R"]:
        """`(d * scale) B`, in the dtype of `d`."""
        B = self._stored(_STREAM_B, rank, d.shape[-1], d.device)
        if scale is not None and d.numel() > rank * d.shape[-1]:
            return scaled_product(d, _scaled(B, scale).T, self._scale(rank))
        return scaled_product(d if scale is None else d * as_dtype(scale, d.dtype), B.T, self._scale(rank))

    def row_products(self, d: Float[Tensor, "T O"], z: Float[Tensor, "T R"]) -> Float[Tensor, "O"]:
        """`sum_t d * (z B^T)`, by way of `d^T z`, in float32 or wider."""
        wide = norm_dtype(d.dtype)
        if d.dtype == torch.float16:
            # Sums over many tokens would overflow.
            d, z = d.to(wide), z.to(wide)
        B = self._stored(_STREAM_B, z.shape[-1], d.shape[-1], d.device).to(wide)
        products = torch.mm(z.T, d, out=out("z d", B.shape, d)).to(wide)
        products = torch.mul(products, B, out=out("z d B", B.shape, products))
        return _column_sums(products) * self._scale(z.shape[-1])

    def updated(
        self, weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]
    ) -> Float[Tensor, "O I"]:
        """`W + diag(beta) B diag(lambda_d) A`, dense."""
        (out_features, in_features), rank = weight.shape, len(lambda_d)
        B = self._like(_STREAM_B, rank, out_features, weight) * lambda_d[:, None]
        scale = self._scale(rank) * self._scale(self._fan_in(in_features))
        return torch.addmm(weight, (B * beta).T, self._like(_STREAM_A, rank, in_features, weight), alpha=scale)

    def update_products(
        self, d: Float[Tensor, "T O"], z: Float[Tensor, "T R"], lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "O"]]:
        """The gradients of `sum_t d * (beta ((z lambda_d) B^T))` with respect to lambda_d and beta."""
        products = (z.T @ d) * self._like(_STREAM_B, z.shape[-1], d.shape[-1], d)
        scale = self._scale(z.shape[-1])
        return (products @ beta) * scale, (lambda_d @ products) * scale

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """`onehot(index) A^T`: columns of A by index, without reading the others."""
        stored = self._stored(_STREAM_A, rank, in_features, index.device)
        return stored[:, index].movedim(0, -1).to(dtype) * self._scale(self._fan_in(in_features))

    def A(self, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "R I"]:
        """The dense matrix A."""
        return self._stored(_STREAM_A, rank, in_features).to(dtype) * self._scale(self._fan_in(in_features))

    def B(self, rank: int, out_features: int, dtype: torch.dtype) -> Float[Tensor, "O R"]:
        """The dense matrix B."""
        return self._stored(_STREAM_B, rank, out_features).to(dtype).T * self._scale(rank)

    def gram(
        self, rank: int, in_features: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Float[Tensor, "R R"]:
        """`G = A A^T`, summed in float64; cached by size, so not to be written to."""

        def made() -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                A = self.A(rank, in_features, torch.float64)
                G = A @ A.T
                # A product need not be symmetric to the last bit.
                return ((G + G.T) / 2).to(dtype)

        return self.store.kept(f"gram_{rank}x{in_features}_{str(dtype).removeprefix('torch.')}", made, device)

    def row_squares(self, lambda_d: Float[Tensor, "R"], in_features: int, out_features: int) -> Float[Tensor, "O"]:
        """`q = ||B diag(lambda_d) A||_row**2`, in `O R min(R, I)` operations: from G, or from A for a rank above I."""
        if len(lambda_d) > in_features:
            A, B = self._both(lambda_d, in_features, out_features)
            return ((B * lambda_d) @ A).square().sum(1)
        return lambda_d @ self._half_dq(lambda_d, in_features, out_features)

    def row_squares_gradient(
        self, v: Float[Tensor, "O"], lambda_d: Float[Tensor, "R"], in_features: int
    ) -> Float[Tensor, "R"]:
        """The gradient of `(v * q).sum()` with respect to lambda_d."""
        return 2 * (self._half_dq(lambda_d, in_features, len(v)) @ v)

    def half_dq(self, lambda_d: Float[Tensor, "R"], in_features: int, out_features: int) -> Float[Tensor, "R O"] | None:
        """Half the derivative of q by lambda_d, where it is small enough to keep for the backward pass."""
        if not keeps_half_dq(len(lambda_d), out_features, lambda_d.dtype):
            return None
        return self._half_dq(lambda_d, in_features, out_features, kept=True)

    def row_dots(self, weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "O"]:
        """`cross = rowsum(W * (B diag(lambda_d) A))`, by chunks of rows."""
        B = self.B(len(lambda_d), len(weight), lambda_d.dtype).to(weight.device)
        parts = [
            (self.project(part.to(lambda_d.dtype), len(lambda_d)) * rows) @ lambda_d
            for part, rows in _row_chunks(weight, B)
        ]
        return torch.cat(parts)

    def row_dots_gradient(self, weight: Float[Tensor, "O I"], v: Float[Tensor, "O"], rank: int) -> Float[Tensor, "R"]:
        """The gradient of `(v * cross).sum()` with respect to lambda_d."""
        B = self.B(rank, len(weight), v.dtype).to(weight.device)
        starts = _row_chunks(weight, B, v)
        parts = [v_part @ (self.project(part.to(v.dtype), rank) * rows) for part, rows, v_part in starts]
        return sum(parts[1:], parts[0])

    def fingerprint_values(self) -> np.ndarray:
        """Some values, (2, 8, 16), float32."""
        return np.stack([uniform_values(self.seed, stream, 8, 16) for stream in (_STREAM_A, _STREAM_B)])

    def saved_tensors(self) -> dict[str, Tensor]:
        """The stored values as they are written into files: unscaled, as large as any layer so far has needed."""
        return self.store.stored()

    def remade(self, name: str, saved: Tensor) -> Tensor | None:
        """What a matrix of a file, named as in `saved_tensors`, should be; None where there is no such matrix."""
        kind, _, stream = name.partition("_")
        if kind != "stream" or stream[:1] not in ("0", "1") or saved.dim() != 2 or not saved.numel():
            return None
        rows, columns = saved.shape
        return torch.from_numpy(self._make(int(stream[:1]), rows, columns))

    def _scale(self, fan_in: int) -> float:
        return math.sqrt(2 / fan_in / _ENTRY_VARIANCE)

    def _fan_in(self, in_features: int) -> int:
        """The inputs of the whole weight."""
        shard = self._shards.get(_STREAM_A)
        return in_features if shard is None else shard.total

    def _both(self, like: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        A, B = self.A(len(like), in_features, like.dtype), self.B(len(like), out_features, like.dtype)
        return A.to(like.device), B.to(like.device)

    def _half_dq(
        self, lambda_d: Float[Tensor, "R"], in_features: int, out_features: int, kept: bool = False
    ) -> Float[Tensor, "R O"]:
        """`B^T * (G diag(lambda_d) B^T)`; q is its product with lambda_d."""
        scaled = lambda_d * self._scale(len(lambda_d)) ** 2
        B = self._like(_STREAM_B, len(lambda_d), out_features, lambda_d)
        if len(lambda_d) > in_features:
            A = self.A(len(lambda_d), in_features, lambda_d.dtype).to(lambda_d.device)
            return (A @ ((B.T * scaled) @ A).T) * B
        G = self.gram(len(lambda_d), in_features, lambda_d.dtype, lambda_d.device)
        return torch.mm(G * scaled, B, out=None if kept else out("half_dq", B.shape, B)).mul_(B)

    def _like(self, stream: int, rank: int, size: int, like: Tensor) -> Tensor:
        return as_dtype(self._stored(stream, rank, size, like.device), like.dtype)

    def _stored(self, stream: int, rank: int, size: int, device: torch.device | None = None) -> Tensor:
        """The unscaled values of one stream for this process, (rank, size): a view."""
        shard = self._shards.get(stream)
        if shard is None:
            return self._whole(stream, rank, size, device)
        return shard.of(self._whole(stream, rank, shard.total, device))

    def _whole(self, stream: int, rank: int, size: int, device: torch.device | None) -> Tensor:
        return self.store.values(stream, rank, size, device)


def scaled_product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    """`scale a b`, in the dtype of `a`, whatever that of `b`; under autocast in the dtype of autocast's products.

    The scale is part of the product, in both directions, so it costs no pass over the values.

    Args:
        a: tokens.
        b: a constant matrix, in any dtype.
        scale: a factor.
    """
    if is_traced() or (b.requires_grad and grad_recorded()):
        return (a * scale) @ b.to(a.dtype)
    # As autocast would, but before scaling, which then reads half the bytes.
    if torch.is_autocast_enabled(a.device.type) and a.dtype != torch.float64:
        a = as_dtype(a, torch.get_autocast_dtype(a.device.type))
    if not (a.requires_grad and grad_recorded()):
        return _product(a, b, scale)
    product: Tensor = _ScaledProduct.apply(a, b, scale)
    return product


def _product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    b = as_dtype(b, a.dtype)
    if a.numel() <= _FEW_TOKENS * a.shape[-1]:
        return (a * scale) @ b
    # As one matrix of tokens: for non-contiguous batches, such as attention's, PyTorch would copy b for each text.
    rows = a.reshape(-1, a.shape[-1])
    # In float16 the unscaled sum of a wide input would overflow, so half precision is scaled first.
    half = a.dtype.itemsize < 4
    product = torch.mm(rows * scale, b) if half else torch.addmm(b[0], rows, b, beta=0, alpha=scale)
    # Not a view to autograd, so callers may write into it.
    whole: Tensor = torch.ops.aten._unsafe_view(product, [*a.shape[:-1], b.shape[1]])
    return whole


class _ScaledProduct(torch.autograd.Function):
    """`scale a b` for a constant b, of which no cast is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(b)
        return _product(a, b, scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (b,) = ctx.saved_tensors
        return scaled_product(gradient, b.T, ctx.scale), None, None


def _scaled(B: Float[Tensor, "R O"], scale: Float[Tensor, "O"]) -> Float[Tensor, "R O"]:
    """`B * scale` for one product, in a reused buffer."""
    room = out("scaled B", B.shape, B) if B.dtype == scale.dtype else None
    return torch.mul(B, scale, out=room)


def _column_sums(matrix: Float[Tensor, "N M"]) -> Float[Tensor, "M"]:
    """As a product with ones, which is faster than a sum on CPUs."""
    return matrix.new_ones(len(matrix)) @ matrix


def _row_chunks(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of a weight, with the same rows of other tensors."""
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    return zip(weight.split(rows), *(other.split(rows) for other in others), strict=True)
