"""The method as pure functions: magnitude and direction of a weight (DoRA) adapted by shared random matrices (VeRA).

    w  = ||W||_row
    V' = W + diag(beta) B diag(lambda_d) A          beta = c w lambda_b ("unit") or c lambda_b ("weight")
    n  = ||V'||_row,   g = m / n,   W' = diag(g) V'
    y  = x W'^T + bias

W, A and B are frozen, so the norm is computed without forming the update:

    C     = B * (W A^T),  G = A A^T                        constants
    cross = C lambda_d,   q = rowsum((U G) * U),  U = B diag(lambda_d)
    n**2  = w**2 + 2 beta cross + beta**2 q

How an update changes a norm is computed relative to k = max(w, |beta|), since an update may be far larger than its row,
and its square too large for the dtype:

    u = w / k,   b = beta / k,   h = n / k,   h**2 = u**2 + change,   change = 2 b cross / k + b**2 q

PyTorch differentiates these functions; `gain` and `combine` have the same ones with closed-form gradients.

Dimensions: T tokens, I in, O out, R rank. lambda_b, lambda_d and their sizes are those of the VeRA paper
(arXiv 2310.11454); m and the norm those of DoRA (arXiv 2402.09353).
"""

from contextlib import nullcontext
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.dtypes import as_dtype, norm_dtype
from ..ops.tracing import is_traced

Direction = Literal["unit", "weight"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)


class Vectors(NamedTuple):
    """The trained vectors of one adapted weight."""

    magnitude: Float[Tensor, "O"]
    lambda_b: Float[Tensor, "O"]
    lambda_d: Float[Tensor, "R"]

    def to(self, dtype: torch.dtype) -> "Vectors":
        """The vectors in another dtype; unchanged where they have it already."""
        return Vectors(*(as_dtype(vector, dtype) for vector in self))


class RowFactors(NamedTuple):
    """How the rows of one adapted weight are rescaled."""

    gain_minus_one: Float[Tensor, "O"]
    """`g - 1 = m / n - 1`, computed without cancellation: exactly zero where nothing was trained."""
    scale: Float[Tensor, "O"]
    """`g beta`, of the low-rank product."""
    gain: Float[Tensor, "O"]
    """`g`, also precise where it is far below one; a constant, since gradients go through `gain_minus_one`."""


FAR = 1e12
"""Vectors with larger values may give factors that are not finite."""


def are_finite(factors: RowFactors) -> bool:
    """Whether all factors are finite."""
    return all(bool(factor.isfinite().all()) for factor in factors)


@runtime_checkable
class NormTerms(Protocol):
    """The constants of one frozen weight from which its adapted norm is computed."""

    @property
    def w(self) -> Float[Tensor, "O"]:
        """Row norms of W."""

    def terms(self, lambda_d: Float[Tensor, "R"]) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
        """`cross` and `q`."""

    def updated_rows(
        self, rows: Tensor, beta: Float[Tensor, "N"], lambda_d: Float[Tensor, "R"]
    ) -> Float[Tensor, "N I"] | None:
        """Rows of V' by index, dense, in float64; None where the weight is not in memory."""


class DenseTerms(NamedTuple):
    """The terms of a weight with given matrices; made by `norm_terms`."""

    w: Float[Tensor, "O"]
    C: Float[Tensor, "O R"]
    G: Float[Tensor, "R R"]
    weight: Float[Tensor, "O I"]
    A: Float[Tensor, "R I"]
    B: Float[Tensor, "O R"]

    def terms(self, lambda_d: Float[Tensor, "R"]) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
        """`cross` and `q`."""
        U = self.B * lambda_d
        return self.C @ lambda_d, torch.linalg.vecdot(U @ self.G, U)

    def updated_rows(
        self, rows: Tensor, beta: Float[Tensor, "N"], lambda_d: Float[Tensor, "R"]
    ) -> Float[Tensor, "N I"]:
        """Rows of V' by index, dense, in float64."""
        update = (beta.double()[:, None] * self.B[rows].double() * lambda_d.double()) @ self.A.double()
        return self.weight[rows].double() + update


def row_norm(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """Euclidean norm of each row, in float32 (float64 for a float64 weight)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=norm_dtype(weight.dtype))
    return norms


def norm_terms(weight: Float[Tensor, "O I"], A: Float[Tensor, "R I"], B: Float[Tensor, "O R"]) -> DenseTerms:
    """The constants of a weight's norm, in the dtype of A and B; differentiable in the weight."""
    wide = weight.to(A.dtype)
    return DenseTerms(row_norm(wide), B * (wide @ A.T), A @ A.T, wide, A, B)


def row_scale(
    lambda_b: Float[Tensor, "O"], w: Float[Tensor, "O"], scaling: float, direction: Direction
) -> Float[Tensor, "O"]:
    """beta, the scale of each row's update: added to the unit rows W / w ("unit") or to W itself ("weight")."""
    return scaling * w * lambda_b if direction == "unit" else scaling * lambda_b


NEAR_CANCELLATION = 0.1
"""Below this share of its squared norm a row's norm is computed from the dense row: the terms have cancelled."""


class RowChange(NamedTuple):
    """The norms of updated rows; for zero rows, as without an update."""

    k: Float[Tensor, "O"]
    """A constant: no result depends on the unit, so no gradient does."""
    u: Float[Tensor, "O"]
    """One for updates smaller than their rows."""
    b: Float[Tensor, "O"]
    change: Float[Tensor, "O"]
    """`h**2 - u**2`, precise for small updates too."""
    h: Float[Tensor, "O"]

    @property
    def ratio(self) -> Float[Tensor, "O"]:
        """`n / w`."""
        return self.h / self.u

    def measured(self, rows: Tensor, ratio: Float[Tensor, "N"]) -> "RowChange":
        """With `n / w` of some rows, by index, replaced."""
        u = self.u[rows]
        h = (ratio * u).to(u.dtype)
        change = self.change.index_copy(0, rows, (h - u) * (h + u))
        return self._replace(change=change, h=self.h.index_copy(0, rows, h))


def row_change(
    w: Float[Tensor, "O"], cross: Float[Tensor, "O"], q: Float[Tensor, "O"], beta: Float[Tensor, "O"]
) -> RowChange:
    """The norms of updated rows from the terms of the norm."""
    live = w > 0
    w, beta = torch.where(live, w, 1.0), torch.where(live, beta, 0.0)
    k = torch.maximum(w, beta.abs()).detach()
    u, b = w / k, beta / k
    u2 = u.square()
    # Rounding can make a squared norm negative; the floor keeps the gain of a vanishing row finite.
    change = torch.maximum(2 * b * (cross / k) + b.square() * q, -u2)
    floor = torch.finfo(w.dtype).eps ** 2 * u2 + torch.finfo(w.dtype).tiny
    return RowChange(k, u, b, change, torch.maximum(u2 + change, floor).sqrt())


def nearly_cancelled(change: RowChange) -> Tensor:
    """Which rows the update nearly cancels."""
    return change.h.square() < NEAR_CANCELLATION * change.u.square()


def indices_if_any(mask: Tensor) -> Tensor | None:
    """Indices of the marked rows; None without any, while tracing, and on devices that would have to synchronise."""
    if is_traced() or mask.device.type != "cpu" or not mask.any():
        return None
    return mask.nonzero()[:, 0]


def measured_ratio(updated: Float[Tensor, "N I"], w: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """`n / w` of a few rows from V' itself, in its dtype; at least the epsilon of w's."""
    ratio: Tensor = torch.linalg.vector_norm(updated, dim=1) / w
    return ratio.clamp_min(torch.finfo(w.dtype).eps)


def relative_norm(norm: NormTerms, lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]) -> RowChange:
    """How the update changes the row norms, from vectors alone; zero rows of W keep their norm."""
    change = row_change(norm.w, *norm.terms(lambda_d), beta)
    near = indices_if_any(nearly_cancelled(change))
    updated = None if near is None else norm.updated_rows(near, beta[near], lambda_d)
    if near is None or updated is None:
        return change
    return change.measured(near, measured_ratio(updated, norm.w[near]))


def row_angle(norm: NormTerms, lambda_d: Float[Tensor, "R"], beta: Float[Tensor, "O"]) -> Float[Tensor, "O"]:
    """Angle between each row of W and the same row of V', in radians; zero for a zero row of W."""
    (cross, q), w2 = norm.terms(lambda_d), norm.w.square()
    # atan2 of the components across and along the row: arccos would lose half the digits of a small angle.
    across = beta.abs() * (q * w2 - cross.square()).clamp_min(0).sqrt()
    return torch.where(norm.w > 0, torch.atan2(across, w2 + beta * cross), 0.0)


def row_factors(vectors: Vectors, norm: NormTerms, beta: Float[Tensor, "O"], detach_norm: bool = False) -> RowFactors:
    """The factors of the rows, from the vectors and the norm.

    Args:
        vectors: magnitude, lambda_b, lambda_d.
        norm: of the frozen weight.
        beta: of `row_scale`.
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    with torch.no_grad() if detach_norm else nullcontext():
        change = relative_norm(norm, vectors.lambda_d, beta)
    return factors_of_change(vectors.magnitude, norm.w.detach() if detach_norm else norm.w, beta, change)


def factors_of_change(
    magnitude: Float[Tensor, "O"], w: Float[Tensor, "O"], beta: Float[Tensor, "O"], change: RowChange
) -> RowFactors:
    """`g - 1 = (m / k - u - change / (u + h)) / h`, and `g beta = m (beta / k) / h`; g = 1 for a zero row."""
    k, u, _, difference, h = change
    live, m = w > 0, magnitude / k
    gain_minus_one = torch.where(live, (m - u - difference / (u + h)) / h, 0.0)
    # The product of g and beta would have no precision where g is far below one.
    scale = torch.where(live, magnitude * (beta / k) / h, beta)
    gain = torch.where(live, m / h, 1.0).detach()
    return RowFactors(gain_minus_one, scale, gain)


def combine(
    base_output: Float[Tensor, "*T O"],
    update: Float[Tensor, "*T O"],
    gain_minus_one: Float[Tensor, "*B O"],
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """`g x W^T + update + bias` from a base output that already holds the bias; in the base output's dtype.

    The gain enters as `g` on the outputs and as `g - 1` on the bias, so that `g = 1` returns the base's own bits.
    Several adapters on one weight add up: pass the sums of their updates and of their `g - 1`.

    Args:
        base_output: `x W^T + bias`.
        update: `g beta ((x A^T) lambda_d) B^T`.
        gain_minus_one: `g - 1`, float32 or float64; one for all tokens, or by row (`PackedFactors`).
        bias: the base's, or None.
    """
    y = torch.addcmul(update, base_output, 1 + gain_minus_one)
    if bias is not None:
        y = y - gain_minus_one * bias
    return y.to(base_output.dtype)


def rescaled_delta(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    lambda_d: Float[Tensor, "R"],
    factors: RowFactors,
) -> Float[Tensor, "O I"]:
    """`W' - W = (g - 1) W + g beta B diag(lambda_d) A`, dense, in the dtype of the gain; exactly zero if untrained."""
    scale = factors.scale[:, None]
    return factors.gain_minus_one[:, None] * weight.to(scale.dtype) + (scale * B * lambda_d) @ A


def gain(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    norm: DenseTerms | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "O"]:
    """`g = m / n` of every row; one for a zero row of W.

    Args:
        weight: W, (O, I).
        A, B: shared matrices, in the dtype of the vectors.
        vectors: magnitude, lambda_b, lambda_d.
        norm: `norm_terms(weight, A, B)`; made here when left out.
        scaling: c = alpha / rank.
        direction: "unit" or "weight".
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    return 1 + _factors(weight, A, B, vectors, norm, scaling, direction, detach_norm).gain_minus_one


def dvora_linear(
    x: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None,
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    norm: DenseTerms | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "*T O"]:
    """`torch.nn.functional.linear(x, weight, bias)` with the weight adapted. Other arguments as for `gain`."""
    factors = _factors(weight, A, B, vectors, norm, scaling, direction, detach_norm)
    z = x @ A.to(x.dtype).T
    update = factors.scale * ((z * vectors.lambda_d.to(x.dtype)) @ B.to(x.dtype).T)
    return combine(torch.nn.functional.linear(x, weight, bias), update, factors.gain_minus_one, bias)


def delta_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    norm: DenseTerms | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W' - W`, dense, in the dtype of the vectors. Arguments as for `gain`."""
    factors = _factors(weight, A, B, vectors, norm, scaling, direction, detach_norm=False)
    return rescaled_delta(weight, A, B, vectors.lambda_d, factors)


def merged_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    norm: DenseTerms | None = None,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W'`, dense, in the dtype of the vectors; W to the last bit if untrained. Arguments as for `gain`."""
    delta = delta_weight(weight, A, B, vectors, norm, scaling=scaling, direction=direction)
    return weight.to(delta.dtype) + delta


def _factors(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    norm: DenseTerms | None,
    scaling: float,
    direction: Direction,
    detach_norm: bool,
) -> RowFactors:
    """The factors of the rows, from the whole layer."""
    norm = norm or norm_terms(weight, A, B)
    return row_factors(vectors, norm, row_scale(vectors.lambda_b, norm.w, scaling, direction), detach_norm)
