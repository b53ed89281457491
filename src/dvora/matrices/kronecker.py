"""Products with a stack of Kronecker products, without ever forming them.

Dimensions: N = n1 n2 the wide side, R the narrow one, *T tokens.

    M = (left (x) right) diag(diagonal), cut to its first rows       left (r1, n1), right (r2, n2), M (rows, N)

A token of N values is an (n1, n2) matrix X, so `x M^T` is `left (X * diagonal) right^T`: r1 n2 (n1 + r2) multiply-adds
with left first, n1 r2 (n2 + r1) with right first, instead of N R. Matrices one upon the other are a stack.
"""

from math import ceil, isqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tensors import Float, as_dtype

_VECTOR = 16
"""Width of a CPU's vector unit: a narrower inner product costs as much as one of this width."""


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
    diagonal: Float[Tensor, "N"]
    rows: int

    def narrow(self, x: Float[Tensor, "*T N"]) -> Float[Tensor, "*T R"]:
        """`x M^T`, in the wider dtype."""
        (r1, n1), (r2, n2) = self.left.shape, self.right.shape
        product = sandwich(self.left, (x * self.diagonal).reshape(-1, n1, n2), self.right.T)
        return product.reshape(*x.shape[:-1], r1 * r2)[..., : self.rows]

    def widen(self, z: Float[Tensor, "*T R"], apart: bool = False) -> Float[Tensor, "*T N"]:
        """`z M`, in the dtype of M. Arguments as for `sandwich`."""
        (r1, n1), (r2, n2) = self.left.shape, self.right.shape
        padded = pad(z, (0, r1 * r2 - self.rows)) if self.rows < r1 * r2 else z
        product = sandwich(self.left.T, as_dtype(padded, self.left.dtype).reshape(-1, r1, r2), self.right, apart)
        product = product.reshape(*z.shape[:-1], n1 * n2)
        # Autograd would record a write to a view, at the price of the copy that is saved here.
        return product * self.diagonal if torch.is_grad_enabled() else product.mul_(self.diagonal)

    def dense(self) -> Float[Tensor, "R N"]:
        """M itself."""
        return torch.kron(self.left, self.right)[: self.rows] * self.diagonal

    def columns(self, index: Tensor) -> Float[Tensor, "*T R"]:
        """Columns of M by an index (*T)."""
        n2 = self.right.shape[1]
        outer = self.left.T[index // n2].unsqueeze(-1) * self.right.T[index % n2].unsqueeze(-2)
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
        if len(self.blocks) == 1:
            return self.blocks[0].widen(z, apart)
        parts = z.split([M.rows for M in self.blocks], -1)
        return torch.stack([M.widen(part, apart) for M, part in zip(self.blocks, parts, strict=True)]).sum(0)

    def dense(self) -> Float[Tensor, "R N"]:
        """M itself."""
        return torch.cat([M.dense() for M in self.blocks])

    def columns(self, index: Tensor) -> Float[Tensor, "*T R"]:
        """Columns of M by an index (*T)."""
        return torch.cat([M.columns(index) for M in self.blocks], -1)

    def squared(self) -> "Stack":
        """M with every entry squared: a Kronecker product of squares is one, and its signs vanish."""
        return Stack(
            tuple(Kronecker(M.left.square(), M.right.square(), M.diagonal.square(), M.rows) for M in self.blocks)
        )

    def to(self, where: torch.device | torch.dtype) -> "Stack":
        """The same on a device or in a dtype."""
        return Stack(
            tuple(Kronecker(M.left.to(where), M.right.to(where), M.diagonal.to(where), M.rows) for M in self.blocks)
        )

    def slice(self, start: int, stop: int) -> "Stack | None":
        """Columns `start` to `stop` of M, as views; None where they split a block of n2 columns."""
        n2 = self.blocks[0].right.shape[1]
        if start % n2 or stop % n2:
            return None
        of_left, own = slice(start // n2, stop // n2), slice(start, stop)
        return Stack(tuple(M._replace(left=M.left[:, of_left], diagonal=M.diagonal[own]) for M in self.blocks))


def sandwich(
    left: Float[Tensor, "a b"], X: Float[Tensor, "t b c"], right: Float[Tensor, "c d"], apart: bool = False
) -> Float[Tensor, "t a d"]:
    """`left X right` for every token, first the side that leaves fewer operations.

    Args:
        left, X, right: the factors.
        apart: multiply every token by itself, so that it gets the same bits alone as among others.
    """
    (a, b), (c, d), tokens = left.shape, right.shape, len(X)
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
