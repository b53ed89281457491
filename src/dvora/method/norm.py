"""The norm terms of one frozen weight: from C, where that is kept, or from the weight in every step.

Dimensions: O out, I in, R rank.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..matrices.interface import Matrices
from ..ops.annotations import Float
from ..ops.dtypes import as_dtype, norm_dtype
from .functional import row_norm

NormCache = Literal["auto"] | bool

_CHUNK_VALUES = 2**22
"""Values of a weight that are converted to float32 at a time."""
_SURE_NORM = 1e-15
"""Below this norm, squares of a row's values may underflow in float32."""
SMALL_CACHE = 2**20
"""Bytes of C that "auto" always keeps; above, it keeps up to `LARGEST_SHARE`."""
LARGEST_SHARE = 1 / 4
"""Of the weight's bytes."""


def cache_dtype(
    matrix: Float[Tensor, "O I"], rank: int, norm_cache: NormCache, cheap: bool = True, readable: bool = True
) -> torch.dtype | None:
    """The dtype in which C is kept; None where its terms are recomputed from the weight in every step.

    "auto" keeps C in float32 if it is small (1 MiB, or a quarter of the weight's bytes), else, for a weight of half
    precision, in bfloat16 if it is small then. C is always kept, in the narrower of these, where recomputing would be
    expensive or impossible: with dense matrices, and for a weight that cannot be read later.

    Args:
        matrix: the weight.
        rank: R.
        norm_cache: True keeps it in float32, False never keeps it.
        cheap: whether products with A and B are cheap enough to repeat.
        readable: whether the weight can be read in every step.
    """
    wide = norm_dtype(matrix.dtype)
    if norm_cache != "auto":
        return wide if norm_cache else None
    values = len(matrix) * rank
    # Opaque weights are read as float32, so their dtype is no guide.
    allowed = max(SMALL_CACHE, LARGEST_SHARE * matrix.numel() * matrix.dtype.itemsize if readable else 0)
    candidates = (wide, torch.bfloat16) if matrix.dtype.itemsize == 2 or not readable else (wide,)
    small = (dtype for dtype in candidates if values * dtype.itemsize <= allowed)
    return next(small, None if cheap and readable else candidates[-1])


def row_norms(matrix: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """The norms of the rows of a frozen weight, correct also where squares underflow in float32."""
    w = row_norm(matrix)
    tiny = w < _SURE_NORM
    if tiny.any():
        # On the CPU, since not every device has float64.
        w[tiny] = torch.linalg.vector_norm(matrix[tiny].cpu(), dim=1, dtype=torch.float64).to(w)
    return w


def cross_matrix(
    matrix: Float[Tensor, "O I"], matrices: Matrices, rank: int, padding_column: int | None, dtype: torch.dtype
) -> Float[Tensor, "O R"]:
    """`C = B * (W A^T)`, computed in float32 or wider by chunks of rows; differentiable in the weight."""
    wide = norm_dtype(matrix.dtype)
    B = matrices.B(rank, len(matrix), wide).to(matrix.device)
    rows = max(1, _CHUNK_VALUES // matrix.shape[1])
    parts = []
    for part, of_b in zip(matrix.split(rows), B.split(rows), strict=True):
        updated = part if padding_column is None else without_column(part, padding_column)
        parts.append((matrices.project(updated.to(wide), rank) * of_b).to(dtype))
    return torch.cat(parts)


class FrozenNorm(NamedTuple):
    """The norm of one weight: `functional.NormTerms` with closed-form gradients."""

    w: Float[Tensor, "O"]
    zero_rows: bool
    """Whether some rows of the weight are zero."""
    C: Float[Tensor, "O R"] | None
    """None: recomputed from the weight."""
    matrix: Float[Tensor, "O I"] | None
    """The weight, where it is in memory."""
    matrices: Matrices
    in_features: int
    rank: int
    padding_column: int | None
    """A column of the weight that the update does not change: the padding entry of an embedding."""

    def terms(self, lambda_d: Float[Tensor, "R"]) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
        """`cross` and `q`."""
        return self.cross(lambda_d), self.squares(lambda_d)

    def cross(self, lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "O"]:
        """`C lambda_d`."""
        if not self.rank:
            return torch.zeros_like(self.w)
        if self.C is not None:
            return _products(as_dtype(self.C, lambda_d.dtype)[None], lambda_d[None])[0]
        return self.matrices.row_dots(self._updated_columns(), lambda_d)

    def cross_gradient(self, d_cross: Float[Tensor, "O"]) -> Float[Tensor, "R"]:
        """The gradient of `(d_cross * cross).sum()` with respect to lambda_d."""
        if not self.rank:
            return d_cross.new_empty(0)
        if self.C is not None:
            return _products_gradient(as_dtype(self.C, d_cross.dtype)[None], d_cross[None])[0]
        return self.matrices.row_dots_gradient(self._updated_columns(), d_cross, self.rank)

    def kept_or_made_C(self) -> Float[Tensor, "O R"]:
        """C in the dtype of w, made from the weight where it is not kept: once for many adapters."""
        if not self.rank:
            return self.w.new_zeros(len(self.w), 0)
        if self.C is not None:
            return as_dtype(self.C, self.w.dtype)
        assert self.matrix is not None
        return cross_matrix(self.matrix, self.matrices, self.rank, self.padding_column, self.w.dtype)

    def half_dq(self, lambda_d: Float[Tensor, "*L R"]) -> Float[Tensor, "*L R O"] | None:
        """Half the derivative of q, which `squares` and its gradient share, where it is small enough to keep."""
        return self.matrices.half_dq(lambda_d, self.in_features, len(self.w)) if self.rank else None

    def squares(
        self, lambda_d: Float[Tensor, "*L R"], half_dq: Float[Tensor, "*L R O"] | None = None
    ) -> Float[Tensor, "*L O"]:
        """`q`, of one layer or of several that differ in lambda_d only."""
        if not self.rank:
            return self.w.new_zeros(*lambda_d.shape[:-1], len(self.w))
        if half_dq is None:
            q = self.matrices.row_squares(lambda_d, self.in_features, len(self.w))
        else:
            q = (lambda_d.unsqueeze(-2) @ half_dq).squeeze(-2)
        if self.padding_column is not None:
            q = q - self.matrices.expand(lambda_d * self._skipped(lambda_d), len(self.w)).square()
        return q

    def squares_half_gradient(
        self,
        d_q: Float[Tensor, "*L O"],
        lambda_d: Float[Tensor, "*L R"],
        half_dq: Float[Tensor, "*L R O"] | None = None,
    ) -> Float[Tensor, "*L R"]:
        """Half the gradient of `(d_q * q).sum()` with respect to lambda_d."""
        if not self.rank:
            return torch.zeros_like(lambda_d)
        if half_dq is None:
            gradient = self.matrices.row_squares_half_gradient(d_q, lambda_d, self.in_features)
        else:
            gradient = (half_dq @ d_q.unsqueeze(-1)).squeeze(-1)
        if self.padding_column is not None:
            a = self._skipped(lambda_d)
            skipped = self.matrices.expand(lambda_d * a, len(self.w))
            gradient = gradient - a * self.matrices.expand_transpose(d_q * skipped, self.rank)
        return gradient

    def updated_rows(
        self, rows: Tensor, beta: Float[Tensor, "N"], lambda_d: Float[Tensor, "R"]
    ) -> Float[Tensor, "N I"] | None:
        """Rows of V' by index, dense, in float64; None where the weight is not in memory."""
        if self.matrix is None:
            return None
        B = self.matrices.B(self.rank, len(self.w), torch.float64).to(rows.device)[rows]
        update = self.matrices.project_transpose(beta.double()[:, None] * B * lambda_d.double(), self.in_features)
        if self.padding_column is not None:
            update = without_column(update, self.padding_column)
        return self.matrix[rows].double() + update

    def _skipped(self, like: Tensor) -> Float[Tensor, "R"]:
        index = torch.tensor(self.padding_column, device=like.device)
        return self.matrices.select(index, self.rank, self.in_features, like.dtype)

    def _updated_columns(self) -> Float[Tensor, "O I"]:
        assert self.matrix is not None
        if self.padding_column is None:
            return self.matrix
        return without_column(self.matrix, self.padding_column)


def without_column(matrix: Float[Tensor, "N I"], column: int) -> Float[Tensor, "N I"]:
    """The matrix with zeros in one column."""
    return matrix.index_fill(1, torch.tensor([column], device=matrix.device), 0.0)


def crosses(norms: Sequence[FrozenNorm], lambda_d: Float[Tensor, "LN R"]) -> Float[Tensor, "LN O"]:
    """`cross` of several layers, of one adapter or of N each."""
    if len(lambda_d) > len(norms):
        by_layer = lambda_d.unflatten(0, (len(norms), -1))
        return torch.cat([own @ norm.kept_or_made_C().mT for norm, own in zip(norms, by_layer, strict=True)])
    if (C := _joined_C(norms)) is not None:
        return _products(C, lambda_d)
    return torch.stack([norm.cross(of_layer) for norm, of_layer in zip(norms, lambda_d, strict=True)])


def crosses_gradient(norms: Sequence[FrozenNorm], d_cross: Float[Tensor, "LN O"]) -> Float[Tensor, "LN R"]:
    """`cross_gradient` of the same."""
    if len(d_cross) > len(norms):
        by_layer = d_cross.unflatten(0, (len(norms), -1))
        return torch.cat([own @ norm.kept_or_made_C() for norm, own in zip(norms, by_layer, strict=True)])
    if (C := _joined_C(norms)) is not None:
        return _products_gradient(C, d_cross)
    return torch.stack([norm.cross_gradient(of_layer) for norm, of_layer in zip(norms, d_cross, strict=True)])


# In these forms a layer gets the same bits alone as with others, so that a run that goes on from a checkpoint, whose
# first pass makes factors layer by layer, is the one that was interrupted.


def _products(C: Float[Tensor, "L O R"], lambda_d: Float[Tensor, "L R"]) -> Float[Tensor, "L O"]:
    return (lambda_d.unsqueeze(-2) @ C.mT).squeeze(-2)


def _products_gradient(C: Float[Tensor, "L O R"], d_cross: Float[Tensor, "L O"]) -> Float[Tensor, "L R"]:
    return (d_cross.unsqueeze(-2) @ C).squeeze(-2)


def _joined_C(norms: Sequence[FrozenNorm]) -> Float[Tensor, "L O R"] | None:
    """The C of all layers as one tensor, where `joined` has made them its parts."""
    first = norms[0].C
    whole = None if first is None else first._base
    if first is None or whole is None or whole.dim() != 3 or len(whole) != len(norms):
        return None
    step = first.numel() * first.itemsize
    for index, norm in enumerate(norms):
        if norm.C is None or norm.C._base is not whole or norm.C.data_ptr() != whole.data_ptr() + index * step:
            return None
    return whole if whole.dtype == norms[0].w.dtype else None


def joined(constants: Sequence[Float[Tensor, "O R"] | None]) -> list[Tensor] | None:
    """The same matrices as parts of one tensor, in float32 or wider; None where some are missing or parts already."""
    first = constants[0]
    if len(constants) == 1 or first is None or first.itemsize < 4 or not first.shape[1]:
        return None
    if any(C is None or C._base is not None or C.shape != first.shape or C.dtype != first.dtype for C in constants):
        return None
    return list(torch.stack([C for C in constants if C is not None]).unbind())
