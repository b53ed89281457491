"""The frozen matrices A and B as stored matrices of independent uniform entries.

Dimensions: T tokens, I in, O out, R rank.

    A (R, I): row k of A is row k of stream 0, cut to I columns and scaled by sqrt(2 / I)
    B (O, R): column k of B is row k of stream 1, cut to O values and scaled by sqrt(2 / R)

Both have the entry variance of Kaiming uniform, 2 / fan_in. The scale depends on the layer's size and is not stored,
so layers of any size and adapters of any rank use the same values (VeRA, arXiv 2310.11454).
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.annotations import Float
from ..ops.buffers import out
from ..ops.dtypes import as_dtype, norm_dtype
from ..ops.tracing import is_traced
from . import philox
from .dense_store import DenseStore, Make
from .shard import Shard

_STREAM_A, _STREAM_B = 0, 1
_ENTRY_VARIANCE = 1 / 3
"""Of the stored values, uniform on (-1, 1)."""
_KEPT_BYTES = 3 * 2**20
"""Keep `half_dq` of one layer for the backward pass up to this size; else recompute it."""
_KEPT_BYTES_OF_ALL = 2**26
"""The same for all layers of one shape, whose factors are made together."""
_WIDEST = 2**16
"""Wider inputs are an embedding's, whose A is indexed; for others the scaled A is made when it is first used."""
_CHUNK_VALUES = 2**18
"""Values of a weight that are projected at a time, or of `half_dq` that are made."""


def keeps_half_dq(rank: int, out_features: int, dtype: torch.dtype, layers: int = 1) -> bool:
    """Whether a step keeps `half_dq` of layers of one shape for its backward pass."""
    return layers * rank * out_features * dtype.itemsize <= (_KEPT_BYTES if layers == 1 else _KEPT_BYTES_OF_ALL)


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
        self._constants: dict[tuple[int, int, int, torch.dtype, torch.device | None], Tensor] = {}
        """Those of the store, found quickly."""

    def of_shard(self, inputs: Shard | None, outputs: Shard | None) -> "DenseMatrices":
        """The columns of A and the rows of B of one process, as views; sizes are then those of its shard."""
        shard = copy.copy(self)  # It shares the store.
        shard._shards, shard._constants = {_STREAM_A: inputs, _STREAM_B: outputs}, {}
        return shard

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        """Make the matrices for a layer now, so that no forward pass has to."""
        self._whole(_STREAM_A, rank, in_features, None)
        self._scaled(_STREAM_B, rank, out_features, dtype)
        if in_features <= _WIDEST:
            self._scaled(_STREAM_A, rank, in_features, dtype)
        if rank <= in_features:
            self.gram(rank, in_features, dtype)

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`, in the dtype of `x`, or of autocast."""
        x = as_autocast(x)
        return _product(x, self._scaled(_STREAM_A, rank, x.shape[-1], x.dtype, x.device).T)

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`, in the dtype of `h`, or of autocast."""
        h = as_autocast(h)
        return _product(h, self._scaled(_STREAM_A, h.shape[-1], in_features, h.dtype, h.device))

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        """`z B^T`, in the dtype of `z`, or of autocast."""
        z = as_autocast(z)
        return _product(z, self._scaled(_STREAM_B, z.shape[-1], out_features, z.dtype, z.device))

    def expand_transpose(
        self, d: Float[Tensor, "*T O"], rank: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "*T R"]:
        """`(d * scale) B`, in the dtype of `d`, or of autocast; not differentiable with a scale."""
        d = as_autocast(d)
        if scale is not None and d.numel() > rank * d.shape[-1]:
            # With more tokens than ranks it is cheaper to scale the matrix.
            B = self._scaled(_STREAM_B, rank, d.shape[-1], scale.dtype, d.device)
            return _product(d, as_dtype(torch.mul(B, scale, out=out("scaled B", B.shape, B)), d.dtype).T)
        B = self._scaled(_STREAM_B, rank, d.shape[-1], d.dtype, d.device)
        return _product(d if scale is None else as_dtype(d * scale, d.dtype), B.T)

    def prepared_projection(
        self, rank: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """`project` for x of one width, dtype and device, without autocast and gradients; of one token it is (1, R)."""
        transpose = self._scaled(_STREAM_A, rank, in_features, dtype, device).T
        return lambda x: _product(x.reshape(1, -1) if x.numel() == in_features else x, transpose)

    def prepared_update(
        self, lambda_d: Float[Tensor, "*B R"], scale: Float[Tensor, "*B O"], dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The function from z (*T, R) and outputs (*T, O) or None to the outputs plus `((z lambda_d) B^T) * scale`.

        It is for z of one dtype, writes into the outputs, and is not differentiable. Values by row cannot go into B.
        """
        inner, is_by_row = as_dtype(lambda_d, dtype), scale.dim() > 1
        B = self._scaled(_STREAM_B, lambda_d.shape[-1], scale.shape[-1], dtype, scale.device)

        def add(z: Tensor, onto: Tensor | None) -> Tensor:
            if is_by_row or is_few(z):
                product = _product(z * inner, B)
                return product.mul_(scale) if onto is None else onto.addcmul_(product, scale)
            both = self._scaled_twice(lambda_d, scale, dtype)
            if onto is None:
                return _product(z, both)
            onto.view(-1, both.shape[1]).addmm_(z.reshape(-1, len(both)), both)
            return onto

        return add

    def update_gradients(
        self,
        d: Float[Tensor, "T O"],
        z: Float[Tensor, "T R"],
        lambda_d: Float[Tensor, "R"],
        scale: Float[Tensor, "O"],
        d_scale: Float[Tensor, "O"],
    ) -> tuple[Float[Tensor, "T R"], Float[Tensor, "R"]]:
        """The gradients of `(d * update(z)).sum()` with respect to z and lambda_d, for d in the dtype of z.

        That with respect to the scale is written into `d_scale`.
        """
        products = self._products(d, z, scale.dtype)
        torch.mv(products.T, as_dtype(lambda_d, scale.dtype), out=d_scale)
        return torch.mm(d, self._scaled_twice(lambda_d, scale, z.dtype).T), products @ scale

    def update_products(
        self, d: Float[Tensor, "T O"], z: Float[Tensor, "T R"], lambda_d: Float[Tensor, "R"], scale: Float[Tensor, "O"]
    ) -> tuple[Float[Tensor, "R"], Float[Tensor, "O"]]:
        """The gradients of `(d * update(z)).sum()` with respect to lambda_d and scale; differentiable."""
        products = self._products(d, z, scale.dtype)
        return products @ scale, as_dtype(lambda_d, scale.dtype) @ products

    def updated(
        self, weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]
    ) -> Float[Tensor, "O I"]:
        """`W + diag(beta) B diag(lambda_d) A`, dense."""
        B = self._scaled_twice(lambda_d, beta, weight.dtype)
        return torch.addmm(
            weight, B.T, self._scaled(_STREAM_A, len(lambda_d), weight.shape[1], weight.dtype, weight.device)
        )

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """`onehot(index) A^T`: columns of A by index, without reading the others."""
        total = self._total(_STREAM_A, in_features)
        chosen = self._own(_STREAM_A, self._whole(_STREAM_A, rank, total, index.device))[:, index]
        return chosen.movedim(0, -1).to(dtype) * self._scale(total)

    def A(self, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "R I"]:
        """The dense matrix A."""
        return self._make_scaled(_STREAM_A, rank, in_features, dtype)

    def B(self, rank: int, out_features: int, dtype: torch.dtype) -> Float[Tensor, "O R"]:
        """The dense matrix B."""
        return self._make_scaled(_STREAM_B, rank, out_features, dtype).T

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

    def row_squares(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L O"]:
        """`q = ||B diag(lambda_d) A||_row**2`, in `O R min(R, I)` operations: from G, or from A for a rank above I."""
        if lambda_d.dim() > 1:
            parts = lambda_d.split(_layers_at_a_time(lambda_d, out_features, in_features))
            return torch.cat([self._row_squares(part, in_features, out_features) for part in parts])
        return self._row_squares(lambda_d, in_features, out_features)

    def row_squares_half_gradient(
        self, v: Float[Tensor, "*L O"], lambda_d: Float[Tensor, "*L R"], in_features: int
    ) -> Float[Tensor, "*L R"]:
        """Half the gradient of `(v * q).sum()` with respect to lambda_d."""
        if lambda_d.dim() > 1:
            layers = _layers_at_a_time(lambda_d, v.shape[-1], in_features)
            parts = zip(v.split(layers), lambda_d.split(layers), strict=True)
            return torch.cat([self._row_squares_half_gradient(*part, in_features) for part in parts])
        return self._row_squares_half_gradient(v, lambda_d, in_features)

    def half_dq(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L R O"] | None:
        """Half the derivative of q by lambda_d, where it is small enough to keep for the backward pass."""
        layers = lambda_d[..., 0].numel()
        if not keeps_half_dq(lambda_d.shape[-1], out_features, lambda_d.dtype, layers):
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

    def _products(self, d: Float[Tensor, "T O"], z: Float[Tensor, "T R"], wide: torch.dtype) -> Float[Tensor, "R O"]:
        """`(z^T d) * B^T`."""
        if d.dtype == torch.float16:
            # Sums over many tokens would overflow.
            d, z = d.to(wide), z.to(wide)
        B = self._scaled(_STREAM_B, z.shape[1], d.shape[1], wide, d.device)
        products = as_dtype(torch.mm(z.T, d, out=out("z d", B.shape, d)), wide)
        return torch.mul(products, B, out=out("z d B", B.shape, products))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DenseMatrices":
        super()._apply(fn, recurse)
        self._constants.clear()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_constants": {}}

    def _row_squares(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L O"]:
        if lambda_d.shape[-1] > in_features:
            A, B = self._both(lambda_d, in_features, out_features)
            return ((B * lambda_d.unsqueeze(-2)) @ A).square().sum(-1)
        return (lambda_d.unsqueeze(-2) @ self._half_dq(lambda_d, in_features, out_features)).squeeze(-2)

    def _row_squares_half_gradient(
        self, v: Float[Tensor, "*L O"], lambda_d: Float[Tensor, "*L R"], in_features: int
    ) -> Float[Tensor, "*L R"]:
        return (self._half_dq(lambda_d, in_features, v.shape[-1]) @ v.unsqueeze(-1)).squeeze(-1)

    def _scale(self, fan_in: int) -> float:
        return math.sqrt(2 / fan_in / _ENTRY_VARIANCE)

    def _both(self, like: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R)."""
        rank, dtype, device = like.shape[-1], like.dtype, like.device
        A = self._scaled(_STREAM_A, rank, in_features, dtype, device)
        return A, self._scaled(_STREAM_B, rank, out_features, dtype, device).T

    def _half_dq(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int, kept: bool = False
    ) -> Float[Tensor, "*L R O"]:
        """`B^T * (G diag(lambda_d) B^T)`; q is its product with lambda_d."""
        rank, dtype, device = lambda_d.shape[-1], lambda_d.dtype, lambda_d.device
        if rank > in_features:
            A, B = self._both(lambda_d, in_features, out_features)
            return (A @ ((B * lambda_d.unsqueeze(-2)) @ A).mT) * B.T
        B = self._scaled(_STREAM_B, rank, out_features, dtype, device).T
        scaled = (self.gram(rank, in_features, dtype, device) * lambda_d.unsqueeze(-2)).view(-1, rank)
        shape = (len(scaled), out_features)
        products = torch.mm(scaled, B.T, out=None if kept else out("half_dq", shape, B))
        return products.view(*lambda_d.shape, out_features).mul_(B.T)

    def _scaled_twice(
        self, lambda_d: Float[Tensor, "R"], scale: Float[Tensor, "O"], dtype: torch.dtype
    ) -> Float[Tensor, "R O"]:
        """`diag(lambda_d) B^T diag(scale)` for one product, in a reused buffer."""
        B = self._scaled(_STREAM_B, len(lambda_d), len(scale), scale.dtype, scale.device)
        room = out("scaled B", B.shape, B)
        return as_dtype(torch.mul(B, as_dtype(lambda_d, B.dtype)[:, None], out=room).mul_(scale), dtype)

    def _scaled(
        self, stream: int, rank: int, size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Float[Tensor, "R N"]:
        """A or the transpose of B for this process, with its scale: a constant, made once for every size and dtype."""
        key = stream, rank, size, dtype, device
        constant = self._constants.get(key)
        if constant is None:
            constant = self._find_scaled(stream, rank, size, dtype, device)
            # A graph being traced holds its own copies.
            if not is_traced():
                self._constants[key] = constant
        return constant

    def _find_scaled(
        self, stream: int, rank: int, size: int, dtype: torch.dtype, device: torch.device | None
    ) -> Float[Tensor, "R N"]:
        total = self._total(stream, size)
        name = f"scaled_{stream}_{rank}x{total}_{str(dtype).removeprefix('torch.')}"
        return self._own(stream, self.store.kept(name, partial(self._make_whole, stream, rank, total, dtype), device))

    def _make_scaled(self, stream: int, rank: int, size: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        """The same, made now."""
        return self._own(stream, self._make_whole(stream, rank, self._total(stream, size), dtype))

    def _total(self, stream: int, size: int) -> int:
        """Of all processes together, where this one has `size`."""
        shard = self._shards.get(stream)
        return size if shard is None else shard.total

    def _own(self, stream: int, whole: Float[Tensor, "R M"]) -> Float[Tensor, "R N"]:
        """The part of this process, as a view."""
        shard = self._shards.get(stream)
        return whole if shard is None else shard.of(whole)

    def _make_whole(self, stream: int, rank: int, total: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        scale = self._scale(total if stream == _STREAM_A else rank)
        with torch.inference_mode(False), torch.no_grad():
            values = self._whole(stream, rank, total, None)
            return (values.to(norm_dtype(dtype)) * scale).to(dtype)

    def _whole(self, stream: int, rank: int, size: int, device: torch.device | None) -> Tensor:
        """The unscaled values of one stream, (rank, size): a view."""
        return self.store.values(stream, rank, size, device)


def is_few(z: Float[Tensor, "*T R"]) -> bool:
    """Whether tokens are scaled rather than B, and training keeps the update: of as many values as two B at most."""
    return z.numel() <= 2 * z.shape[-1] ** 2


def as_autocast(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "*T N"]:
    """The tokens in the dtype in which autocast multiplies matrices, where it is on."""
    if tokens.dtype == torch.float64 or not torch.is_autocast_enabled(tokens.device.type):
        return tokens
    return as_dtype(tokens, torch.get_autocast_dtype(tokens.device.type))


def _product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"]) -> Float[Tensor, "*T N"]:
    """`a b` as one matrix of tokens: for non-contiguous batches, such as attention's, PyTorch would copy b for each."""
    if a.dim() < 3:
        return a @ b
    product = torch.mm(a.reshape(-1, a.shape[-1]), b)
    # Not a view to autograd, so callers may write into it.
    whole: Tensor = torch.ops.aten._unsafe_view(product, [*a.shape[:-1], b.shape[1]])
    return whole


def _layers_at_a_time(lambda_d: Float[Tensor, "L R"], out_features: int, in_features: int) -> int:
    return max(1, _CHUNK_VALUES // (out_features * max(lambda_d.shape[1], in_features)))


def _row_chunks(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of a weight, with the same rows of other tensors."""
    rows = max(1, _CHUNK_VALUES // weight.shape[1])
    return zip(weight.split(rows), *(other.split(rows) for other in others), strict=True)
