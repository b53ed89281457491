"""Row sums of `B diag(lambda_d) A` for stacks of Kronecker products, without a matrix of outputs by rank or inputs.

Dimensions: I in, O out = m1 m2, R rank. A is a stack (R, I), Bt = B^T a stack (R, O). With the factors E1 (p1, m1),
E2 (p2, m2) and the signs d of one block of Bt, and the rank index k = (k1, k2), the output index j = (j1, j2):

    (B diag(lambda_d) A)[j] = d[j] sum_k2 E2[k2, j2] V[j1, k2]
    V[j1, k2]               = sum_k1 E1[k1, j1] lambda_d[k1, k2] A[k1, k2]            m1 p2 vectors of I values

so that products with the rows of W are one small dense product for every j1: `W[j1] V[j1]^T`.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import kronecker
from .kronecker import Kronecker, Stack, narrow, widen
from .shapes import Float

_CHUNK_VALUES = 2**18
"""Values of V at a time."""


def row_products(d: Float[Tensor, "T O"], z: Float[Tensor, "T R"], Bt: Stack) -> Float[Tensor, "O"]:
    """`sum_t d[t] * (z[t] B^T)`, in the dtype of the stack."""
    total = Bt[0].diagonal.new_zeros(d.shape[1])
    start = 0
    for M in Bt:
        total = total + _block_products(d, z[:, start : start + M.rows], M)
        start += M.rows
    return total


def _block_products(d: Float[Tensor, "T O"], z: Float[Tensor, "T R"], M: Kronecker) -> Float[Tensor, "O"]:
    # The sum over tokens comes before the one over k2: nothing of the size of d is made.
    left, right, diagonal, rows = M
    (p1, m1), (p2, m2) = left.shape, right.shape
    summed = right.new_zeros(m1, m2, p2)
    chunk = max(16, _CHUNK_VALUES // (m1 * (m2 + p2)))
    for d_part, z_part in zip(d.split(chunk), z.split(chunk), strict=True):
        tokens = pad(z_part.to(left.dtype), (0, p1 * p2 - rows)).view(-1, p1, p2)
        inner = left.T @ tokens
        outputs = d_part.to(right.dtype).view(-1, m1, m2)
        summed = torch.baddbmm(summed, outputs.permute(1, 2, 0), inner.transpose(0, 1))
    return (summed * right.T).sum(-1).flatten() * diagonal


def row_squares(lambda_d: Float[Tensor, "R"], A: Stack, Bt: Stack) -> Float[Tensor, "O"]:
    """Squared norms of the rows of `B diag(lambda_d) A`."""
    if len(A) == 1:
        return 2 * widen(lambda_d.square(), _squared(Bt))
    B = kronecker.dense(Bt).T
    return torch.cat([widen(part * lambda_d, A).square().sum(1) for part in B.split(_rows_at_a_time(A))])


def row_squares_gradient(
    v: Float[Tensor, "O"], lambda_d: Float[Tensor, "R"], A: Stack, Bt: Stack
) -> Float[Tensor, "R"]:
    """Gradient of `(v * row_squares).sum()` with respect to lambda_d."""
    if len(A) == 1:
        return 4 * lambda_d * narrow(v, _squared(Bt))
    total = torch.zeros_like(lambda_d)
    size = _rows_at_a_time(A)
    for part, v_part in zip(kronecker.dense(Bt).T.split(size), v.split(size), strict=True):
        total = total + 2 * (part * narrow(v_part[:, None] * widen(part * lambda_d, A), A)).sum(0)
    return total


def row_dots(weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"], A: Stack, Bt: Stack) -> Float[Tensor, "O"]:
    """Products of the rows of W with those of `B diag(lambda_d) A`."""
    total: Tensor | float = 0.0
    for M, start in _starts(Bt):
        p1, p2 = M.left.shape[0], M.right.shape[0]
        grid = pad(lambda_d[start : start + M.rows], (0, p1 * p2 - M.rows)).view(p1, p2)
        parts = []
        for rows, left in _groups(weight, M):
            V = _mixed(left, grid, A, M, start)
            dots = rows.to(V.dtype) @ V.mT
            parts.append((dots * M.right.T).sum(-1))
        total = total + torch.cat(parts).flatten() * M.diagonal
    assert isinstance(total, Tensor)
    return total


def row_dots_gradient(weight: Float[Tensor, "O I"], v: Float[Tensor, "O"], A: Stack, Bt: Stack) -> Float[Tensor, "R"]:
    """Gradient of `(v * row_dots).sum()` with respect to lambda_d."""
    found = []
    for M, start in _starts(Bt):
        (p1, m1), (p2, m2) = M.left.shape, M.right.shape
        scaled = (v * M.diagonal).view(m1, 1, m2) * M.right
        total = M.left.new_zeros(p1, p2)
        row = 0
        for rows, left in _groups(weight, M):
            Y = scaled[row : row + len(rows)] @ rows.to(scaled.dtype)
            total = total + _unmixed(left, Y, A, M, start)
            row += len(rows)
        found.append(total.flatten()[: M.rows])
    return torch.cat(found)


def _mixed(
    left: Float[Tensor, "c p1"], grid: Float[Tensor, "p1 p2"], A: Stack, M: Kronecker, start: int
) -> Float[Tensor, "c p2 I"]:
    """V for some j1: sums over k1 of rows of A."""
    if (common := _common_grid(A, M)) is None:
        # The rank vector of V[j1, k2] has values at that k2 only.
        vectors = torch.diag_embed(left[:, :, None] * grid).movedim(3, 1).flatten(2).flatten(0, 1)[:, : M.rows]
        rank = sum(block.rows for block in A)
        return widen(pad(vectors, (start, rank - start - M.rows)), A).view(len(left), grid.shape[1], -1)
    t, q, h, e = common
    C1, C2 = _common_factors(A[0], common)
    mixing = _padded(left, 1, t * h)[:, :, None] * _padded(grid, 0, t * h)
    inner = mixing.view(-1, t, h, q, e).permute(0, 3, 4, 2, 1).flatten(2, 3) @ C1
    inner = inner.view(len(left), q, e, h, -1, 1)
    V = inner[:, :, :, 0] * C2[0]
    for index in range(1, h):
        V = torch.addcmul(V, inner[:, :, :, index], C2[index])
    return V.flatten(3).flatten(1, 2)


def _unmixed(
    left: Float[Tensor, "c p1"], Y: Float[Tensor, "c p2 I"], A: Stack, M: Kronecker, start: int
) -> Float[Tensor, "p1 p2"]:
    """The transpose of `_mixed` in its grid."""
    (c, p1), p2 = left.shape, M.right.shape[0]
    if (common := _common_grid(A, M)) is None:
        products = narrow(Y.flatten(0, 1), A)[:, start : start + M.rows]
        grid = pad(products, (0, p1 * p2 - M.rows)).view(c, p2, p1, p2).diagonal(dim1=1, dim2=3)
        return (grid * left[:, :, None]).sum(0)
    t, q, h, e = common
    C1, C2 = _common_factors(A[0], common)
    Y = Y.view(c, q, e, *C2.shape[2:])
    inner = torch.stack([(Y * C2[index]).sum(-1) for index in range(h)], 3)
    grid = (inner.flatten(2, 3) @ C1.mT).view(c, q, e, h, t).permute(0, 4, 3, 1, 2).reshape(c, t * h, p2)
    return (grid[:, :p1] * left[:, :, None]).sum(0)


def _common_grid(A: Stack, M: Kronecker) -> tuple[int, int, int, int] | None:
    """Counts of (t, q, h, e) such that A counts the rank k as ((t, q), (h, e)) and B^T as ((t, h), (q, e)).

    There are such where one of r2 and p2 divides the other; q or h is one. V is then a sum of h outer products.
    """
    if len(A) > 1 or A[0].rows != M.rows:
        return None
    r2, p2 = A[0].right.shape[0], M.right.shape[0]
    e = min(r2, p2)
    if max(r2, p2) % e:
        return None
    q, h = p2 // e, r2 // e
    return ceil(M.rows / (q * h * e)), q, h, e


def _common_factors(
    A: Kronecker, common: tuple[int, int, int, int]
) -> tuple[Float[Tensor, "q t n1"], Float[Tensor, "h e n1 n2"]]:
    """The factors of A on the common grid, the right one with the signs."""
    t, q, h, e = common
    n1, n2 = A.left.shape[1], A.right.shape[1]
    C1 = _padded(A.left, 0, t * q).view(t, q, n1).transpose(0, 1)
    return C1, A.right.view(h, e, 1, n2) * A.diagonal.view(n1, n2)


def _padded(matrix: Tensor, dim: int, size: int) -> Tensor:
    """The matrix with zeros up to a size, in one of its two dimensions."""
    missing = size - matrix.shape[dim]
    return pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing)) if missing else matrix


def _groups(weight: Float[Tensor, "O I"], M: Kronecker) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of W by j1, (c, m2, I), with the columns of E1 for them, (c, p1): a few at a time."""
    (_, m1), (p2, m2) = M.left.shape, M.right.shape
    size = max(1, _CHUNK_VALUES // (p2 * weight.shape[1]))
    return zip(weight.view(m1, m2, -1).split(size), M.left.T.split(size), strict=True)


def _starts(stack: Stack) -> Iterator[tuple[Kronecker, int]]:
    start = 0
    for M in stack:
        yield M, start
        start += M.rows


def _squared(stack: Stack) -> Stack:
    return tuple(Kronecker(M.left.square(), M.right.square(), torch.ones_like(M.diagonal), M.rows) for M in stack)


def _rows_at_a_time(A: Stack) -> int:
    return max(1, _CHUNK_VALUES // A[0].diagonal.shape[0])
