"""Row sums of `B diag(lambda_d) A` for stacks of Kronecker products, without a matrix of outputs by rank or inputs.

Dimensions: I in, O out = m1 m2, R rank. A is a stack (R, I) of blocks with orthogonal rows of squared norm two,
Bt = B^T a stack (R, O). With the factors E1 (p1, m1), E2 (p2, m2) and the signs d of one block of Bt, and the indices
k = (k1, k2) of the rank and j = (j1, j2) of the outputs:

    (B diag(lambda_d) A)[j] = d[j] sum_k2 E2[k2, j2] V[j1, k2]
    V[j1, k2]               = sum_k1 E1[k1, j1] lambda_d[k1, k2] A[k1, k2]            m1 p2 vectors of I values

so that products with the rows of W are one small dense product for every j1: `W[j1] V[j1]^T`.
"""

from collections.abc import Iterator
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.annotations import Float
from ..ops.buffers import out
from . import kronecker
from .kronecker import Kronecker, Stack, apply, apply_transpose

_CHUNK_VALUES = 2**20
"""Values of V at a time."""


def row_squares(lambda_d: Float[Tensor, "*L R"], A: Stack, Bt: Stack) -> Float[Tensor, "*L O"]:
    """Squared norms of the rows of `B diag(lambda_d) A`, of one layer or of several."""
    if len(A) == 1:
        # The rows of A are orthogonal, of squared norm two, and the squares of a Kronecker product are one.
        return 2 * apply(lambda_d.square(), _squared(Bt))
    if lambda_d.dim() > 1:
        return torch.stack([row_squares(of_layer, A, Bt) for of_layer in lambda_d])
    A, Bt = _aligned(A, Bt)
    rows = [_update_rows(group, lambda_d, A, Bt) for group in _groups(A, Bt)]
    return torch.cat([part.square().sum(-1).flatten() for part in rows])


def row_squares_half_gradient(
    v: Float[Tensor, "*L O"], lambda_d: Float[Tensor, "*L R"], A: Stack, Bt: Stack
) -> Float[Tensor, "*L R"]:
    """Half the gradient of `(v * row_squares).sum()` with respect to lambda_d."""
    if len(A) == 1:
        return 2 * lambda_d * apply_transpose(v, _squared(Bt))
    if lambda_d.dim() > 1:
        return torch.stack([row_squares_half_gradient(*of_layer, A, Bt) for of_layer in zip(v, lambda_d, strict=True)])
    A, Bt = _aligned(A, Bt)
    total = torch.zeros_like(lambda_d)
    for group in _groups(A, Bt):
        total = total + _rank_sums(group, _update_rows(group, lambda_d, A, Bt), v, A, Bt)
    return total


def row_dots(weight: Float[Tensor, "O I"], lambda_d: Float[Tensor, "R"], A: Stack, Bt: Stack) -> Float[Tensor, "O"]:
    """Products of the rows of W with those of `B diag(lambda_d) A`."""
    A, Bt = _aligned(A, Bt)
    found = []
    for group in _groups(A, Bt):
        rows = _by_j1(weight, Bt)[group].to(lambda_d.dtype)
        if not _few_vectors(A, Bt):
            found.append((apply_transpose(rows.flatten(0, 1), A) * _rows_of_B(group, Bt)) @ lambda_d)
            continue
        parts = []
        for M, start in _starts(Bt):
            dots = rows @ _mixed(M.left.T[group], _grid(lambda_d, M, start), A, M, start).mT
            parts.append((dots * M.right.T).sum(-1) * _by_j1(M.diagonal, Bt)[group])
        found.append(sum(parts[1:], parts[0]).flatten())
    return torch.cat(found)


def row_dots_gradient(weight: Float[Tensor, "O I"], v: Float[Tensor, "O"], A: Stack, Bt: Stack) -> Float[Tensor, "R"]:
    """Gradient of `(v * row_dots).sum()` with respect to lambda_d."""
    A, Bt = _aligned(A, Bt)
    total = v.new_zeros(sum(M.rows for M in Bt))
    for group in _groups(A, Bt):
        total = total + _rank_sums(group, _by_j1(weight, Bt)[group].to(v.dtype), v, A, Bt)
    return total


def _update_rows(group: slice, lambda_d: Float[Tensor, "R"], A: Stack, Bt: Stack) -> Float[Tensor, "c m2 I"]:
    """The rows of `B diag(lambda_d) A` for some j1."""
    if not _few_vectors(A, Bt):
        return _by_j1(apply(_rows_of_B(group, Bt) * lambda_d, A), Bt)
    parts = []
    for M, start in _starts(Bt):
        V = _mixed(M.left.T[group], _grid(lambda_d, M, start), A, M, start)
        parts.append((_by_j1(M.diagonal, Bt)[group][:, :, None] * M.right.T) @ V)
    return sum(parts[1:], parts[0])


def _rank_sums(
    group: slice, rows: Float[Tensor, "c m2 I"], v: Float[Tensor, "O"], A: Stack, Bt: Stack
) -> Float[Tensor, "R"]:
    """For every k the sum over some rows j of `v[j] B[j, k] (A[k] . rows[j])`."""
    if not _few_vectors(A, Bt):
        scaled = (_by_j1(v, Bt)[group][:, :, None] * rows).flatten(0, 1)
        return (apply_transpose(scaled, A) * _rows_of_B(group, Bt)).sum(0)
    found = []
    for M, start in _starts(Bt):
        scaled = _by_j1(v * M.diagonal, Bt)[group][:, None, :] * M.right
        Y = torch.bmm(scaled, rows, out=out("Y", (*scaled.shape[:2], rows.shape[2]), rows))
        found.append(_unmixed(M.left.T[group], Y, A, M, start).flatten()[: M.rows])
    return torch.cat(found)


def _mixed(
    left: Float[Tensor, "c p1"], grid: Float[Tensor, "p1 p2"], A: Stack, M: Kronecker, start: int
) -> Float[Tensor, "c p2 I"]:
    """V for some j1: sums over k1 of rows of A."""
    if (block := _matching(A, M, start)) is None:
        # The rank vector of V[j1, k2] has values at that k2 only.
        vectors = torch.diag_embed(left[:, :, None] * grid).movedim(3, 1).flatten(2).flatten(0, 1)[:, : M.rows]
        rank = sum(other.rows for other in A)
        return apply(pad(vectors, (start, rank - start - M.rows)), A).view(len(left), grid.shape[1], -1)
    t, q, h, e = _common_grid(block, M)
    C1, C2 = _common_factors(block, M)
    mixing = _padded(left, 1, t * h)[:, :, None] * _padded(grid, 0, t * h)
    inner = mixing.view(-1, t, h, q, e).permute(0, 3, 4, 2, 1).flatten(2, 3) @ C1
    inner = inner.view(len(left), q, e, h, -1, 1)
    room = out("V", (len(left), q, e, *C2.shape[2:]), inner)
    V = torch.mul(inner[:, :, :, 0], C2[0], out=room)
    for index in range(1, h):
        V = torch.addcmul(V, inner[:, :, :, index], C2[index], out=room)
    return V.flatten(3).flatten(1, 2)


def _unmixed(
    left: Float[Tensor, "c p1"], Y: Float[Tensor, "c p2 I"], A: Stack, M: Kronecker, start: int
) -> Float[Tensor, "p1 p2"]:
    """The transpose of `_mixed` in its grid."""
    (c, p1), p2 = left.shape, M.right.shape[0]
    if (block := _matching(A, M, start)) is None:
        products = apply_transpose(Y.flatten(0, 1), A)[:, start : start + M.rows]
        grid = pad(products, (0, p1 * p2 - M.rows)).view(c, p2, p1, p2).diagonal(dim1=1, dim2=3)
        return (grid * left[:, :, None]).sum(0)
    t, q, h, e = _common_grid(block, M)
    C1, C2 = _common_factors(block, M)
    Y = Y.view(c, q, e, *C2.shape[2:])
    room = out("Y products", Y.shape, Y)
    inner = torch.stack([torch.mul(Y, C2[index], out=room).sum(-1) for index in range(h)], 3)
    grid = (inner.flatten(2, 3) @ C1.mT).view(c, q, e, h, t).permute(0, 4, 3, 1, 2).reshape(c, t * h, p2)
    return (grid[:, :p1] * left[:, :, None]).sum(0)


def _aligned(A: Stack, Bt: Stack) -> tuple[Stack, Stack]:
    """Both stacks, cut wherever a block of either ends, where that is a whole row of a left factor."""
    ends = [{start + M.rows for M, start in _starts(stack)} for stack in (A, Bt)]
    return _cut(A, ends[1]), _cut(Bt, ends[0])


def _cut(stack: Stack, ends: set[int]) -> Stack:
    parts = []
    for M, start in _starts(stack):
        r2, first = M.right.shape[0], 0
        inside = [end - start for end in sorted(ends) if 0 < end - start < M.rows and (end - start) % r2 == 0]
        for last in [*inside, M.rows]:
            parts.append(M._replace(left=M.left[first // r2 : ceil(last / r2)], rows=last - first))
            first = last
    return tuple(parts)


def _matching(A: Stack, M: Kronecker, start: int) -> Kronecker | None:
    """The block of A with the ranks of M, if one of r2 and p2 divides the other: V is then made of outer products."""
    for block, first in _starts(A):
        narrower, wider = sorted((block.right.shape[0], M.right.shape[0]))
        if (first, block.rows) == (start, M.rows) and wider % narrower == 0:
            return block
    return None


def _common_grid(A: Kronecker, M: Kronecker) -> tuple[int, int, int, int]:
    """Counts of (t, q, h, e), q or h one, such that A counts the rank as ((t, q), (h, e)) and M as ((t, h), (q, e))."""
    r2, p2 = A.right.shape[0], M.right.shape[0]
    e = min(r2, p2)
    return ceil(M.rows / max(r2, p2)), p2 // e, r2 // e, e


def _common_factors(A: Kronecker, M: Kronecker) -> tuple[Float[Tensor, "q t n1"], Float[Tensor, "h e n1 n2"]]:
    """The factors of A on the common grid, the right one with the signs."""
    t, q, h, e = _common_grid(A, M)
    n1, n2 = A.left.shape[1], A.right.shape[1]
    C1 = _padded(A.left, 0, t * q).view(t, q, n1).transpose(0, 1)
    return C1, A.right.view(h, e, 1, n2) * A.diagonal.view(n1, n2)


def _padded(matrix: Tensor, dim: int, size: int) -> Tensor:
    """The matrix with zeros up to a size, in one of its two dimensions."""
    missing = size - matrix.shape[dim]
    return pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing)) if missing else matrix


def _grid(lambda_d: Float[Tensor, "R"], M: Kronecker, start: int) -> Float[Tensor, "p1 p2"]:
    p1, p2 = M.left.shape[0], M.right.shape[0]
    return pad(lambda_d[start : start + M.rows], (0, p1 * p2 - M.rows)).view(p1, p2)


def _by_j1(values: Tensor, Bt: Stack) -> Tensor:
    """Values of outputs, (O, ...), by j1 and j2: (m1, m2, ...)."""
    return values.view(-1, Bt[0].right.shape[1], *values.shape[1:])


def _rows_of_B(group: slice, Bt: Stack) -> Float[Tensor, "J R"]:
    """The dense rows of B for some j1."""
    parts = (M._replace(left=M.left[:, group], diagonal=_by_j1(M.diagonal, Bt)[group].flatten()) for M in Bt)
    return kronecker.dense(tuple(parts)).T


def _few_vectors(A: Stack, Bt: Stack) -> bool:
    """Whether V, where it is not made of outer products, needs fewer vectors than there are outputs."""
    return sum(M.right.shape[0] for M, start in _starts(Bt) if not _matching(A, M, start)) < Bt[0].right.shape[1]


def _groups(A: Stack, Bt: Stack) -> list[slice]:
    """Slices of j1 for which V fits `_CHUNK_VALUES`."""
    m1, p2 = Bt[0].left.shape[1], max(M.right.shape[0] for M in Bt)
    size = max(1, _CHUNK_VALUES // (p2 * A[0].diagonal.shape[0]))
    return [slice(first, first + size) for first in range(0, m1, size)]


def _starts(stack: Stack) -> Iterator[tuple[Kronecker, int]]:
    start = 0
    for M in stack:
        yield M, start
        start += M.rows


def _squared(stack: Stack) -> Stack:
    return tuple(Kronecker(M.left.square(), M.right.square(), torch.ones_like(M.diagonal), M.rows) for M in stack)
