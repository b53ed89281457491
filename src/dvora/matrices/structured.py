"""Frozen matrices A and B that need no dense product: subsampled cosine transforms behind random signs.

Dimensions: I in, O out, R rank; I = n1 n2 and O = m1 m2.

    A (R, I) = sqrt(2) (C1 (x) C2) D            D random signs, C1 and C2 random rows of orthonormal DCT-II matrices
    B (O, R) = s D' (E1 (x) E2)^T               the same over the outputs, s = sqrt(2 O / R)

Both are cut to R rows or columns and have the entry variance of Kaiming uniform, 2 / fan_in. A rank above a size stacks
independent blocks of at most that size. Up to that rank the rows of A are orthogonal (`A A^T = 2`) and the squares of B
are a Kronecker product without signs, so the row norms of `B diag(lambda_d) A` take two small products.

A prime size has no other factors: its transform is the dense cosine matrix, with 2 size rank operations a token.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..ops.annotations import Float
from ..ops.dtypes import as_dtype, norm_dtype
from ..ops.tracing import is_traced
from . import kronecker, philox, structured_norms, structured_update
from .kronecker import Kronecker, Stack, apply, apply_transpose
from .shard import Shard

Side = Literal["A", "B"]

_FIRST_STREAM: dict[Side, int] = {"A": 2**34, "B": 2**34 + 1}
"""Block k of a matrix draws from this stream plus 2 k; its rows are the signs and the orders of both factors."""

_SIGNS, _LEFT, _RIGHT = 0, 1, 2

_Array = NDArray[np.float64]
_Key = tuple[Side, int, int, torch.dtype]


class StructuredMatrices(nn.Module):
    """The structured `A` and `B` of one seed, for every layer size and rank, made on demand.

    They are a few small buffers for each size and rank, outside the state dict: buffers follow device moves, ignore
    casts and are made again from the seed when the module leaves the meta device.

    Args:
        seed: names the matrices, 0 <= seed < 2**64.
        use_triton: whether CUDA tensors are transformed and combined by the Triton kernels.
    """

    products_are_cheap = True

    def __init__(self, seed: int, use_triton: bool = False) -> None:
        super().__init__()
        self.seed = seed
        self.use_triton = use_triton
        self._stacks: dict[_Key, Stack] = {}
        self._copies: dict[tuple[_Key, torch.device], Stack] = {}
        self._made: dict[_Key, list[tuple[tuple[str, str, str], int]]] = {}
        self._shards: dict[Side, Shard | None] = {}

    def of_shard(self, inputs: Shard | None, outputs: Shard | None) -> "StructuredMatrices":
        """The columns of A and the rows of B of one process; sizes are then those of its shard."""
        # A shallow copy shares the buffers, those made later too.
        shard = copy.copy(self)
        shard._shards = {"A": inputs, "B": outputs}
        return shard

    def reserve(self, rank: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> None:
        """Make the matrices for a layer now, so that no forward pass has to."""
        self._stack("A", rank, in_features, dtype)
        self._stack("B", rank, out_features, dtype)

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        """`x A^T`, in the dtype of `x`."""
        return apply_transpose(x, self._stack_for(x, "A", rank, x.shape[-1]), self.use_triton)

    def project_transpose(self, h: Float[Tensor, "*T R"], in_features: int) -> Float[Tensor, "*T I"]:
        """`h A`, the transpose of `project`, in the dtype of `h`."""
        return apply(h, self._stack_for(h, "A", h.shape[-1], in_features), self.use_triton)

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        """`z B^T`, in the dtype of `z`."""
        return apply(z, self._stack_for(z, "B", z.shape[-1], out_features), self.use_triton)

    def expand_transpose(
        self, d: Float[Tensor, "*T O"], rank: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "*T R"]:
        """`(d * scale) B`, the transpose of `expand`, in the dtype of `d`; not differentiable with a scale."""
        stack = self._stack_for(d, "B", rank, d.shape[-1])
        return apply_transpose(d, stack if scale is None else kronecker.scaled(stack, scale), self.use_triton)

    def prepared_projection(
        self, rank: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> Callable[[Tensor], Tensor]:
        """`project` for x of one width, dtype and device, without autocast and gradients; of one token it is (1, R)."""
        stack = self._stack_for(torch.empty(0, dtype=dtype, device=device), "A", rank, in_features)
        return kronecker.prepared_apply_transpose(stack, self.use_triton)

    def prepared_update(
        self, lambda_d: Float[Tensor, "*B R"], scale: Float[Tensor, "*B O"], dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The function from z (*T, R) and outputs (*T, O) or None to the outputs plus `((z lambda_d) B^T) * scale`.

        It is for z of one dtype, writes into the outputs, and is not differentiable.
        """
        like = scale.new_empty(0, dtype=dtype)
        stack = kronecker.scaled(self._stack_for(like, "B", lambda_d.shape[-1], scale.shape[-1]), scale)
        inner = as_dtype(lambda_d, dtype)
        add = structured_update.prepared_add_product(stack, self.use_triton)
        return lambda z, onto: add(z * inner, onto)

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
        stack = self._stack("B", len(lambda_d), len(scale), norm_dtype(d.dtype), d.device)
        return structured_update.scaled_gradients(d, z, lambda_d, scale, stack, d_scale)

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        """`onehot(index) A^T`: columns of A by index, without reading the others."""
        stack = self._stack("A", rank, in_features, norm_dtype(dtype), index.device)
        return kronecker.columns(stack, index).to(dtype)

    def A(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R I"]:
        """The dense matrix `A`."""
        return kronecker.dense(self._stack("A", rank, in_features, norm_dtype(dtype))).to(dtype)

    def B(self, rank: int, out_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "O R"]:
        """The dense matrix `B`."""
        return kronecker.dense(self._stack("B", rank, out_features, norm_dtype(dtype))).T.to(dtype)

    def gram(self, rank: int, in_features: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "R R"]:
        """`G = A A^T`; twice the identity up to rounding for a rank of at most `in_features`."""
        A = self.A(rank, in_features, norm_dtype(dtype))
        return self.project(A, rank).to(dtype)

    def row_squares(
        self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int
    ) -> Float[Tensor, "*L O"]:
        """`q`, the squared norms of the rows of `B diag(lambda_d) A`."""
        A, Bt = self._pair(lambda_d, lambda_d.shape[-1], in_features, out_features)
        return structured_norms.row_squares(lambda_d, A, Bt)

    def row_squares_half_gradient(
        self, v: Float[Tensor, "*L O"], lambda_d: Float[Tensor, "*L R"], in_features: int
    ) -> Float[Tensor, "*L R"]:
        """Half the gradient of `(v * q).sum()` with respect to lambda_d."""
        A, Bt = self._pair(lambda_d, lambda_d.shape[-1], in_features, v.shape[-1])
        return structured_norms.row_squares_half_gradient(v, lambda_d, A, Bt)

    def half_dq(self, lambda_d: Float[Tensor, "*L R"], in_features: int, out_features: int) -> None:
        """None: q is cheap, and its derivative would be as large as B."""

    def row_dots(self, weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "O"]:
        """`cross`, the products of the rows of W with those of `B diag(lambda_d) A`."""
        out_features, in_features = weight.shape
        return structured_norms.row_dots(
            weight, lambda_d, *self._pair(lambda_d, len(lambda_d), in_features, out_features)
        )

    def row_dots_gradient(self, weight: Float[Tensor, "O I"], v: Float[Tensor, "O"], rank: int) -> Float[Tensor, "R"]:
        """The gradient of `(v * cross).sum()` with respect to lambda_d."""
        out_features, in_features = weight.shape
        return structured_norms.row_dots_gradient(weight, v, *self._pair(v, rank, in_features, out_features))

    def fingerprint_values(self) -> np.ndarray:
        """Values that differ between seeds and formats, float32."""
        sides: tuple[Side, Side] = ("A", "B")
        blocks = [block for side in sides for block in _blocks(self.seed, side, 40, 35)]
        return np.concatenate([part.ravel() for block in blocks for part in block]).astype(np.float32)

    def saved_tensors(self) -> dict[str, Tensor]:
        """What files hold of the matrices: nothing."""
        return {}

    def remade(self, name: str, saved: Tensor) -> Tensor | None:
        """None: files hold no such tensors."""
        return None

    def extra_repr(self) -> str:
        return f"seed={self.seed}"

    def _pair(self, like: Tensor, rank: int, in_features: int, out_features: int) -> tuple[Stack, Stack]:
        dtype, device = norm_dtype(like.dtype), like.device
        return self._stack("A", rank, in_features, dtype, device), self._stack("B", rank, out_features, dtype, device)

    def _stack_for(self, x: Tensor, side: Side, rank: int, size: int) -> Stack:
        # A CPU multiplies small matrices faster in float32 than in half precision, and rounds once; the Triton kernel
        # takes float32 too.
        wide = x.is_cpu or (x.is_cuda and self.use_triton)
        dtype = norm_dtype(x.dtype) if wide else x.dtype
        return self._stack(side, rank, size, dtype, x.device)

    def _stack(self, side: Side, rank: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Stack:
        shard = self._shards.get(side)
        if shard is None:
            return self._whole(side, rank, size, dtype, device)
        return kronecker.column_slice(self._whole(side, rank, shard.total, dtype, device), shard.start, shard.stop)

    def _whole(self, side: Side, rank: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Stack:
        key = (side, rank, size, dtype)
        stack = self._stacks.get(key)
        if stack is None:
            if key not in self._made:
                if torch.compiler.is_compiling():
                    return self._cast(key, device)
                self._make(key, device)
            stack = self._stacks[key] = self._of_buffers(key)
        if device is None or stack[0].left.device == device:
            return stack
        there = self._copies.get((key, device))
        if there is None:
            with torch.inference_mode(False):
                there = tuple(
                    Kronecker(M.left.to(device), M.right.to(device), M.diagonal.to(device), M.rows) for M in stack
                )
            # A graph being traced holds its own copies.
            if not is_traced():
                self._copies[key, device] = there
        return there

    def _of_buffers(self, key: _Key) -> Stack:
        return tuple(self._block(names, rows) for names, rows in self._made[key])

    def _block(self, names: tuple[str, str, str], rows: int) -> Kronecker:
        left, right, diagonal = (self._buffers[name] for name in names)
        assert left is not None
        assert right is not None
        assert diagonal is not None
        return Kronecker(left, right, diagonal, rows)

    def _cast(self, key: _Key, device: torch.device | None) -> Stack:
        """The matrices cast to a dtype that has no buffers yet: a traced graph cannot register any."""
        side, rank, size, dtype = key
        known = {made[3].itemsize: made[3] for made in self._made if made[:3] == key[:3]}
        stack = self._whole(side, rank, size, known[max(known)], device)
        return tuple(Kronecker(M.left.to(dtype), M.right.to(dtype), M.diagonal.to(dtype), M.rows) for M in stack)

    def _make(self, key: _Key, device: torch.device | None) -> None:
        side, rank, size, dtype = key
        made = []
        for index, (left, right, diagonal) in enumerate(_blocks(self.seed, side, rank, size)):
            head = f"{side}_{rank}x{size}_{str(dtype).removeprefix('torch.')}_{index}"
            names = (f"{head}_left", f"{head}_right", f"{head}_diagonal")
            with torch.inference_mode(False):
                for name, values in zip(names, (left, right, diagonal), strict=True):
                    # Cast first: not every device has float64.
                    tensor = torch.from_numpy(values).to(dtype).to(device)
                    self.register_buffer(name, tensor, persistent=False)
            made.append((names, kronecker.block_rows(rank, size)[index]))
        self._made[key] = made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StructuredMatrices":
        # Follow only the device of `fn`, found with an empty tensor: a cast would round the matrices, and `to_empty`
        # would leave them undefined.
        for key, blocks in list(self._made.items()):
            stack = self._whole(*key)
            device = fn(stack[0].left.new_empty(0)).device
            if stack[0].left.is_meta and device.type != "meta":
                self._make(key, device)
                continue
            for names, _ in blocks:
                for name in names:
                    self._buffers[name] = self.get_buffer(name).to(device)
        self._stacks.clear()
        self._copies.clear()
        # Not at the next pass: a graph that found nothing kept would add it, and be compiled a second time. Buffers on
        # the meta device may be replaced one by one.
        made = {key: self._of_buffers(key) for key in self._made}
        self._stacks.update({key: stack for key, stack in made.items() if not stack[0].left.is_meta})
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}


def _blocks(seed: int, side: Side, rank: int, size: int) -> list[tuple[_Array, _Array, _Array]]:
    """Left factor, right factor and signs of each block of a matrix, in float64; the left factor includes the scale."""
    n1, n2 = kronecker.factors_of_size(size)
    scale = np.sqrt(2.0 if side == "A" else 2.0 * size / rank)
    blocks = []
    for index, rows in enumerate(kronecker.block_rows(rank, size)):
        stream = _FIRST_STREAM[side] + 2 * index
        r1, r2 = kronecker.factors_of_rows(rows, n1, n2)
        left = philox.cosine_rows(philox.permutation_row(seed, stream, _LEFT, n1)[:r1], n1) * scale
        right = philox.cosine_rows(philox.permutation_row(seed, stream, _RIGHT, n2)[:r2], n2)
        blocks.append((left, right, philox.sign_row(seed, stream, _SIGNS, size)))
    return blocks
