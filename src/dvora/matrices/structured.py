"""Frozen matrices A and B that need no dense product: subsampled cosine transforms behind random signs.

Dimensions: *T tokens, I in, O out, R rank, N either of I and O; I = n1 n2, O = m1 m2.

    A (R, I) = sqrt(2) (C1 (x) C2) D            D random signs, C1 and C2 random rows of orthonormal DCT-II matrices
    B (O, R) = s D' (E1 (x) E2)^T               the same over the outputs, s = sqrt(2 O / R)

Both are cut to R rows or columns and have the entry variance of Kaiming uniform, 2 / fan_in. A rank above a size stacks
independent blocks of at most that size. Up to that rank the rows of A are orthogonal (`A A^T = 2`) and the squares of B
are a Kronecker product without signs, so the row norms of `B diag(lambda_d) A` take two small products.

A block M = (left (x) right) diag(diagonal), cut to its first rows, with left (r1, n1) and right (r2, n2), need not be
formed (`is_dense`): a token of N values is an (n1, n2) matrix X, and `x M^T` is `left (X * diagonal) right^T`, which
takes r1 n2 (n1 + r2) multiply-adds with left first and n1 r2 (n2 + r1) with right first, instead of N R.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import ceil, isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from ..tensors import Float, as_dtype, full_precision, grad_recorded, is_traced, norm_dtype, times, times_apart
from . import philox
from .base import Constant, Matrices, Side

_FIRST_STREAM: dict[Side, int] = {"A": 2**34, "B": 2**34 + 1}
"""Block k of a matrix draws from this stream plus 2 k; its rows are the signs and the orders of both factors."""

_SIGNS, _LEFT, _RIGHT = 0, 1, 2

_VECTOR = 16
"""Width of a CPU's vector unit: a narrower inner product costs as much as one of this width."""

_FEW_VALUES = 2**14
_FEW_SQUARES = 2**18
"""Up to this many values, squares of B are kept as a matrix: a product with one vector is bound by its launches."""

_PRODUCT: dict[Side, str] = {"A": "A product", "B": "B product"}
"""The constant that products with a side take: its factors, or where `is_dense` its values."""
_ROWS: dict[Side, str] = {"A": "A rows", "B": "B rows"}
"""Values with the rank last, in order."""
_SQUARED = "B squared"


@lru_cache(maxsize=1024)
def factors_of_size(size: int) -> tuple[int, int]:
    """`n1 <= n2` with `n1 n2 = size`, as close to the square root as divisors allow; for a prime n1 = 1."""
    n1 = next(divisor for divisor in range(isqrt(size), 0, -1) if size % divisor == 0)
    return n1, size // n1


def factors_of_rows(rows: int, n1: int, n2: int) -> tuple[int, int]:
    """`r1 <= n1` and `r2 <= n2` with `rows <= r1 r2 < rows + r2`: the fewest operations with right first.

    r2 is counted in whole vectors. The smallest has the fewest: n1 n2 r2 outweighs what a better fit of r1 r2 can save.
    """
    r2 = min(n2, rows, _VECTOR * ceil(rows / (_VECTOR * n1)))
    return ceil(rows / r2), r2


def block_rows(rows: int, size: int) -> list[int]:
    """The rows of each matrix of a stack: at most `size`, since no more can be orthogonal."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def operations(rows: int, size: int) -> int:
    """Multiply-adds of one product with a stack, or with its transpose, for each token, the diagonal included."""
    n1, n2 = factors_of_size(size)
    total = 0
    for part in block_rows(rows, size):
        r1, r2 = factors_of_rows(part, n1, n2)
        total += size + min(_of_both_orders(r1, n1, n2, r2))
    return total


class Kronecker(NamedTuple):
    """`(left (x) right) diag(diagonal)`, cut to its first `rows` rows."""

    left: Float[Tensor, "r1 n1"]
    right: Float[Tensor, "r2 n2"]
    diagonal: Float[Tensor, "N"] | None
    """None: all one."""
    rows: int

    def narrow(self, x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T R"]:
        """`x M^T`, in the wider dtype."""
        (r1, n1), (r2, n2) = self.left.shape, self.right.shape
        signed = x if self.diagonal is None else x * self.diagonal
        product = sandwich(self.left, signed.reshape(-1, n1, n2), self.right.T)
        return product.reshape(*x.shape[:-1], r1 * r2)[..., : self.rows]

    def widen(
        self, z: Float[Tensor, "*T R"], apart: bool = False, onto: Float[Tensor, "*T N"] | None = None
    ) -> Float[Tensor, "*T N"]:
        """`z M`, in the dtype of M, or the sum of it and what is given. Other arguments as for `sandwich`."""
        (r1, n1), (r2, n2) = self.left.shape, self.right.shape
        padded = pad(z, (0, r1 * r2 - self.rows)) if self.rows < r1 * r2 else z
        product = sandwich(self.left.T, as_dtype(padded, self.left.dtype).reshape(-1, r1, r2), self.right, apart)
        product = product.reshape(*z.shape[:-1], n1 * n2)
        if self.diagonal is None:
            return product if onto is None else product + onto
        if onto is not None:
            return torch.addcmul(onto, product, self.diagonal)
        # Autograd would record a write to a view, at the price of the copy that is saved here.
        return product * self.diagonal if torch.is_grad_enabled() else product.mul_(self.diagonal)

    def dense(self) -> Float[Tensor, "R N"]:
        """M itself."""
        values = torch.kron(self.left, self.right)[: self.rows]
        return values if self.diagonal is None else values * self.diagonal

    def columns(self, index: Tensor) -> Float[Tensor, "*T R"]:
        """Columns of M by an index (*T)."""
        n2 = self.right.shape[1]
        outer = self.left.T[index // n2].unsqueeze(-1) * self.right.T[index % n2].unsqueeze(-2)
        assert self.diagonal is not None
        return (outer.flatten(-2) * self.diagonal[index].unsqueeze(-1))[..., : self.rows]


class Stack(NamedTuple):
    """Matrices upon each other; R counts the rows of all."""

    blocks: tuple[Kronecker, ...]

    def narrow(self, x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T R"]:
        """`x M^T`, in the wider dtype."""
        parts = [M.narrow(x) for M in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def widen(self, z: Float[Tensor, "*T R"], apart: bool = False) -> Float[Tensor, "*T N"]:
        """`z M`, in the dtype of M. Arguments as for `sandwich`."""
        first, *others = z.split([M.rows for M in self.blocks], -1)
        total = self.blocks[0].widen(first, apart)
        for M, part in zip(self.blocks[1:], others, strict=True):
            total = M.widen(part, apart, onto=total)
        return total

    def dense(self) -> Float[Tensor, "R N"]:
        """M itself."""
        return torch.cat([M.dense() for M in self.blocks])

    def columns(self, index: Tensor) -> Float[Tensor, "*T R"]:
        """Columns of M by an index (*T)."""
        return torch.cat([M.columns(index) for M in self.blocks], -1)

    def squared(self) -> "Stack":
        """Twice M with every entry squared: a Kronecker product of squares is one, and its signs vanish."""
        return Stack(tuple(Kronecker(2 * M.left.square(), M.right.square(), None, M.rows) for M in self.blocks))

    def to(self, where: torch.device | torch.dtype) -> "Stack":
        """The same on a device or in a dtype."""
        blocks = []
        for left, right, diagonal, rows in self.blocks:
            moved = None if diagonal is None else diagonal.to(where)
            blocks.append(Kronecker(left.to(where), right.to(where), moved, rows))
        return Stack(tuple(blocks))

    def slice(self, start: int, stop: int) -> "Stack | None":
        """Columns `start` to `stop` of M, as views; None where they split a block of n2 columns."""
        n2 = self.blocks[0].right.shape[1]
        if start % n2 or stop % n2:
            return None
        of_left, own = slice(start // n2, stop // n2), slice(start, stop)
        signs = [None if M.diagonal is None else M.diagonal[own] for M in self.blocks]
        blocks = zip(self.blocks, signs, strict=True)
        return Stack(tuple(M._replace(left=M.left[:, of_left], diagonal=part) for M, part in blocks))


def sandwich(
    left: Float[Tensor, "a b"], X: Float[Tensor, "t b c"], right: Float[Tensor, "c d"], apart: bool = False
) -> Float[Tensor, "t a d"]:
    """`left X right` for every token, first the side that leaves fewer operations.

    Args:
        left, X, right: the factors.
        apart: multiply every token by itself, so that it gets the same bits alone as among others.
    """
    # Not len(X), which would make a traced size a constant; so where rows are counted everywhere in a pass.
    (a, b), (c, d), tokens = left.shape, right.shape, X.shape[0]
    of_left_first, of_right_first = _of_both_orders(a, b, c, d)
    every_left, every_right = left.expand(tokens, a, b), right.expand(tokens, c, d) if apart else None
    if of_left_first <= of_right_first:
        return _times_right(torch.bmm(every_left, X), right, every_right)
    return torch.bmm(every_left, _times_right(X, right, every_right))


def _times_right(
    X: Float[Tensor, "t b c"], right: Float[Tensor, "c d"], every_right: Float[Tensor, "t c d"] | None
) -> Float[Tensor, "t b d"]:
    if every_right is not None:
        return torch.bmm(X, every_right)
    return (X.reshape(-1, X.shape[-1]) @ right).view(*X.shape[:-1], right.shape[1])


def _of_both_orders(a: int, b: int, c: int, d: int) -> tuple[int, int]:
    """Multiply-adds of `sandwich` for each token, with left first and with right first."""
    return a * c * (b + d), b * d * (a + c)


@lru_cache(maxsize=1024)
def is_dense(rank: int, size: int) -> bool:
    """Whether products take the values of a matrix rather than its factors: up to 16,384 values, and for a prime size.

    One dense product is one call where factors take four. Time of the factors' product by that of the dense one,
    `x A^T` / `z A`, measured with PyTorch 2.13 in float32 on one core with AVX-512 (two cores give the same):

    | size x rank         | 1 token   | 16 tokens | 128 tokens | 512 tokens |
    |---------------------|-----------|-----------|------------|------------|
    | 64 x 64 (4,096)     | 5.6 / 6.0 | 3.7 / 3.7 | 2.5 / 2.3  | 2.3 / 2.1  |
    | 256 x 16 (4,096)    | 5.9 / 6.1 | 3.3 / 4.8 | 1.9 / 4.7  | 1.7 / 4.8  |
    | 512 x 16 (8,192)    | 5.1 / 5.1 | 1.9 / 2.3 | 0.8 / 1.3  | 0.6 / 1.2  |
    | 256 x 64 (16,384)   | 4.0 / 4.3 | 1.3 / 1.3 | 0.5 / 0.6  | 0.5 / 0.5  |
    | 1024 x 16 (16,384)  | 4.1 / 4.2 | 1.2 / 1.6 | 0.6 / 0.9  | 0.5 / 0.8  |
    | 512 x 64 (32,768)   | 3.0 / 3.2 | 0.8 / 0.8 | 0.4 / 0.4  | 0.3 / 0.4  |
    | 256 x 256 (65,536)  | 1.8 / 2.1 | 0.5 / 0.5 | 0.3 / 0.3  | 0.2 / 0.2  |
    | 1024 x 256 (262,144)| 0.6 / 0.6 | 0.2 / 0.1 | 0.2 / 0.1  | 0.2 / 0.1  |

    So the dense product is ahead up to 8,192 values for many tokens, 32,768 for 16 and 200,000 for one. The rule lies
    between and does not ask for the tokens, so that a token's output does not depend on how a batch is split. A size
    with small factors, 2 x 503 say, is faster with them too (0.5 to 0.7); only a prime has no factors.
    """
    return rank * size <= max(_FEW_VALUES, operations(rank, size))


class StructuredMatrices(Matrices):
    """A and B as Kronecker products of cosines, kept for every size and rank as two small factors and signs."""

    def is_dense(self, rank: int, size: int) -> bool:
        return is_dense(rank, size)

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        A: Stack | Tensor = self._constant(_PRODUCT["A"], rank, in_features, norm_dtype(dtype), index.device)
        columns = A.columns(index) if isinstance(A, Stack) else A[:, index].movedim(0, -1)
        return as_dtype(columns, dtype)

    def rows(self, side: Side, rank: int, size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "N R"]:
        constant: Tensor = self._constant(_ROWS[side], rank, size, dtype, device)
        return constant

    def update(
        self, lambda_d: Float[Tensor, "R"], in_features: int, out_features: int, scale: Float[Tensor, "O"] | None = None
    ) -> Float[Tensor, "O I"]:
        side, size = _rows_of_update(len(lambda_d), in_features, out_features)
        rows = self.rows(side, len(lambda_d), size, lambda_d.dtype, lambda_d.device) * lambda_d
        if side == "B":
            return self.project_transpose(rows if scale is None else rows * scale[:, None], in_features)
        columns = self.expand(rows, out_features)
        return (columns if scale is None else columns * scale).T.contiguous()

    def update_gradient(self, d_update: Float[Tensor, "O I"], rank: int) -> Float[Tensor, "R"]:
        side, size = _rows_of_update(rank, *reversed(d_update.shape))
        rows = self.rows(side, rank, size, d_update.dtype, d_update.device)
        products = self.project(d_update, rank) if side == "B" else self.expand_transpose(d_update.T.contiguous(), rank)
        # What has a gradient may be a view.
        return (products * rows if products.requires_grad else products.mul_(rows)).sum(0)

    def squares(self, lambda_d: Float[Tensor, "*N R"], in_features: int, out_features: int) -> Float[Tensor, "*N O"]:
        rank = lambda_d.shape[-1]
        if rank > in_features:
            return super().squares(lambda_d, in_features, out_features)
        squares = self._constant(_SQUARED, rank, out_features, lambda_d.dtype, lambda_d.device)
        with full_precision(lambda_d.device):
            rows = lambda_d.square()
            return squares.widen(rows, apart=True) if isinstance(squares, Stack) else times_apart(rows, squares)

    def squares_gradient(
        self, d_half_q: Float[Tensor, "*N O"], lambda_d: Float[Tensor, "*N R"], in_features: int
    ) -> Float[Tensor, "*N R"]:
        rank = lambda_d.shape[-1]
        if rank > in_features:
            return super().squares_gradient(d_half_q, lambda_d, in_features)
        squares = self._constant(_SQUARED, rank, d_half_q.shape[-1], lambda_d.dtype, lambda_d.device)
        with full_precision(lambda_d.device):
            return lambda_d * _narrowed(squares, d_half_q)

    def fingerprint_values(self) -> np.ndarray:
        """Values that differ between seeds and formats, float32."""
        blocks = [block for side in _FIRST_STREAM for block in _blocks(self.seed, side, 40, 35)]
        return np.concatenate([part.ravel() for block in blocks for part in block]).astype(np.float32)

    def _narrow(self, side: Side, x: Float[Tensor, "*T N"], rank: int) -> Float[Tensor, "*T R"]:
        M = self._constant(_PRODUCT[side], rank, x.shape[-1], _inner_dtype(x.dtype, x.device), x.device)
        return as_dtype(_narrowed(M, x), x.dtype)

    def _widen(self, side: Side, z: Float[Tensor, "*T R"], size: int) -> Float[Tensor, "*T N"]:
        M = self._constant(_PRODUCT[side], z.shape[-1], size, _inner_dtype(z.dtype, z.device), z.device)
        return as_dtype(_widened(M, z), z.dtype)

    def _needed(
        self, rank: int, in_features: int, out_features: int, dtype: torch.dtype, values: bool
    ) -> Iterable[Constant]:
        wide, of_update = norm_dtype(dtype), _rows_of_update(rank, in_features, out_features)
        if values:
            yield "A", rank, in_features, dtype
            yield "B", rank, out_features, dtype
        for each in dict.fromkeys((wide, _inner_dtype(dtype, self._home))):
            yield _PRODUCT["A"], rank, in_features, each
            yield _PRODUCT["B"], rank, out_features, each
        if rank <= in_features:
            yield _SQUARED, rank, out_features, wide
        if values or rank > in_features:
            yield _ROWS[of_update[0]], rank, of_update[1], wide

    def _made(self, name: str, rank: int, size: int, dtype: torch.dtype) -> Stack | Tensor:
        if name == _SQUARED:
            B: Stack | Tensor = self._constant(_PRODUCT["B"], rank, size, dtype, torch.device("cpu"))
            if isinstance(B, Stack) and rank * size > _FEW_SQUARES:
                return B.squared()
            return 2 * (B.dense() if isinstance(B, Stack) else B).square()
        for of, rows in _ROWS.items():
            if name == rows:
                return self._values(of, rank, size, dtype).T.contiguous()
        if name not in _PRODUCT.values():
            values: Tensor = super()._made(name, rank, size, dtype)
            return values
        side: Side = "A" if name == _PRODUCT["A"] else "B"
        stack, shard = self._stack(side, rank, self._total(side, size), dtype), self._shards[side]
        part = stack if shard is None else stack.slice(shard.start, shard.stop)
        return self._values(side, rank, size, dtype) if part is None or is_dense(rank, size) else part

    def _whole(self, side: Side, rank: int, total: int, dtype: torch.dtype) -> Float[Tensor, "R N"]:
        return self._stack(side, rank, total, dtype).dense()

    def _stack(self, side: Side, rank: int, total: int, dtype: torch.dtype) -> Stack:
        blocks = []
        for rows, factors in zip(block_rows(rank, total), _blocks(self.seed, side, rank, total), strict=True):
            left, right, signs = [torch.from_numpy(factor).to(dtype) for factor in factors]
            blocks.append(Kronecker(left, right, signs, rows))
        return Stack(tuple(blocks))


def _rows_of_update(rank: int, in_features: int, out_features: int) -> tuple[Side, int]:
    """The side whose rows the product with the other makes the update of, and how many it has.

    The fewer, where a rank above them makes both dear; else those of B, since the rows of A give the update transposed.
    """
    return ("A", in_features) if in_features < min(rank, out_features) else ("B", out_features)


def _narrowed(M: Stack | Tensor, x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T R"]:
    return _transformed(M, x, True) if isinstance(M, Stack) else times(as_dtype(x, M.dtype), M.T)


def _widened(M: Stack | Tensor, z: Float[Tensor, "*T R"]) -> Float[Tensor, "*T N"]:
    return _transformed(M, z, False) if isinstance(M, Stack) else times(as_dtype(z, M.dtype), M)


def _transformed(M: Stack, x: Tensor, narrow: bool) -> Tensor:
    if grad_recorded() and x.requires_grad and not is_traced():
        product: Tensor = _Product.apply(x, M, narrow)
        return product
    # Autocast's dtype is slower for small matrices than float32 on a CPU.
    with full_precision(x.device):
        return M.narrow(x) if narrow else M.widen(x)


class _Product(torch.autograd.Function):
    """`x M^T` or `x M`, whose gradient is the other one: a single step for autograd, which saves nothing of a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Stack, narrow: bool) -> Tensor:
        ctx.M, ctx.narrow, ctx.dtype = M, narrow, x.dtype
        ctx.set_materialize_grads(False)
        return _transformed(M, x, narrow)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None, None]:
        if gradient is None:
            return None, None, None
        return as_dtype(_transformed(ctx.M, gradient, not ctx.narrow), ctx.dtype), None, None


def _inner_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A CPU multiplies small matrices faster in float32 than in half precision, and rounds once."""
    return norm_dtype(dtype) if device.type == "cpu" else dtype


def _blocks(
    seed: int, side: Side, rank: int, size: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]]:
    """Left factor, right factor and signs of each block of a matrix; the left factor includes the scale."""
    n1, n2 = factors_of_size(size)
    scale = np.sqrt(2.0 if side == "A" else 2.0 * size / rank)
    blocks = []
    for index, rows in enumerate(block_rows(rank, size)):
        stream = _FIRST_STREAM[side] + 2 * index
        r1, r2 = factors_of_rows(rows, n1, n2)
        left = philox.cosine_rows(philox.permutation_row(seed, stream, _LEFT, n1)[:r1], n1) * scale
        right = philox.cosine_rows(philox.permutation_row(seed, stream, _RIGHT, n2)[:r2], n2)
        blocks.append((left, right, philox.sign_row(seed, stream, _SIGNS, size)))
    return blocks
