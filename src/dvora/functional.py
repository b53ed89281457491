"""The method as pure functions: magnitude and direction of a weight (DoRA) adapted by shared random matrices (VeRA).

    w  = ||W||_row
    V' = W + diag(beta) B A',   A' = diag(lambda_d) A          beta = c w lambda_b ("unit") or c lambda_b ("weight")
    n  = ||V'||_row,   g = m / n,   W' = diag(g) V'
    y  = x W'^T + bias

With lambda_d by groups, the columns are cut into G groups of consecutive ones, column i in group floor(i G / I), and
each has a lambda_d of its own: `A'[r, i] = lambda_d[group of i, r] A[r, i]`. One group is DVoRA, as many as columns are
LoRA with a frozen B.

This is the definition: all else is tested against it, and what is compiled, exported or transformed runs it.

W, A and B are frozen, so the norm needs no dense update. In units of the row norm, kappa = beta / w, s = n / w:

    cross = rowsum(W / w * (B A')) = rowsum(B * (W / w A'^T))
    q     = rowsum((B A')**2) = rowsum((B M) * B),   M = A' A'^T
    s**2  = 1 + eps,   eps = kappa (2 cross + kappa q)

    g - 1 = (m / w - 1 - eps / (1 + s)) / s        without cancellation: exactly zero where nothing was trained
    scale = g beta = m kappa / s

In these units nothing overflows or underflows for rows of any length, in float32 too.

Dimensions: T tokens, I in, O out, R rank, G groups, K values of lambda_d: R, or G R. lambda_b, lambda_d and their sizes
are those of the VeRA paper (arXiv 2310.11454); m and the norm those of DoRA (arXiv 2402.09353).
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .tensors import Float, as_dtype, norm_dtype

Direction = Literal["unit", "weight"]
DIRECTIONS: tuple[str, ...] = get_args(Direction)

__all__ = [
    "DIRECTIONS",
    "Direction",
    "RowFactors",
    "Vectors",
    "combine",
    "delta_weight",
    "dvora_linear",
    "gain",
    "merged_weight",
    "relative_scale",
    "rescaled_delta",
    "row_angle",
    "row_factors",
    "row_norm",
    "scaled_columns",
    "unit_rows",
    "update_terms",
]


class Vectors(NamedTuple):
    """The trained vectors of one adapted weight."""

    magnitude: Float[Tensor, "*L O"]
    lambda_b: Float[Tensor, "*L O"]
    lambda_d: Float[Tensor, "*L K"]
    """(R,), or of one weight by groups (G, R)."""

    def to(self, dtype: torch.dtype) -> "Vectors":
        """The vectors in a dtype, lambda_d as (K,), a group after the other."""
        m, b, d = self
        d = d if d.dim() == m.dim() else d.flatten()
        if m.dtype == b.dtype == d.dtype == dtype:
            return Vectors(m, b, d)
        return Vectors(m.to(dtype), b.to(dtype), d.to(dtype))

    def are_trained(self) -> bool:
        """Whether any of them requires a gradient."""
        m, b, d = self
        return m.requires_grad or b.requires_grad or d.requires_grad


class RowFactors(NamedTuple):
    """What rescales the out features of one adapted weight."""

    gain_minus_one: Float[Tensor, "*L O"]
    """`g - 1 = m / n - 1`."""
    scale: Float[Tensor, "*L O"]
    """`g beta`, of the low-rank product."""
    gain: Float[Tensor, "*L O"]
    """`g`, precise where it is far below one; a constant, since gradients go through `gain_minus_one`."""


def row_norm(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O"]:
    """Euclidean norm of each row, in float32 (float64 for a float64 weight)."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=norm_dtype(weight.dtype))
    return norms


def unit_rows(weight: Float[Tensor, "O I"], w: Float[Tensor, "O"]) -> Float[Tensor, "O I"]:
    """`W / w`, in the dtype of w; zero rows stay zero."""
    return as_dtype(weight, w.dtype) / torch.where(w > 0, w, 1.0)[:, None]


def scaled_columns(A: Float[Tensor, "R I"], lambda_d: Float[Tensor, "*G R"]) -> Float[Tensor, "R I"]:
    """`A'`: A with every column scaled by the lambda_d of its group, for a lambda_d (R,) or (G, R)."""
    if lambda_d.dim() == 1:
        return A * lambda_d[:, None]
    return A * lambda_d[torch.arange(A.shape[1], device=A.device) * len(lambda_d) // A.shape[1]].T


def update_terms(
    weight: Float[Tensor, "O I"],
    w: Float[Tensor, "O"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    lambda_d: Float[Tensor, "*G R"],
) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
    """`cross` and `q` of an update, without a matrix of the weight's size."""
    scaled = scaled_columns(A, lambda_d)
    cross = torch.linalg.vecdot(unit_rows(weight, w) @ scaled.T, B)
    return cross, torch.linalg.vecdot(B @ (scaled @ scaled.T), B)


def relative_scale(
    lambda_b: Float[Tensor, "*L O"], w: Float[Tensor, "*L O"], scaling: float, direction: Direction
) -> Float[Tensor, "*L O"]:
    """`kappa = beta / w`: how large each row's update is beside it, for `||B diag(lambda_d) A|| = 1`; 0 for w = 0."""
    live = w > 0
    return scaling * lambda_b * (live if direction == "unit" else live / torch.where(live, w, 1.0))


def row_factors(
    vectors: Vectors,
    w: Float[Tensor, "*L O"],
    cross: Float[Tensor, "*L O"],
    q: Float[Tensor, "*L O"],
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> RowFactors:
    """The factors of the rows, from the vectors and the terms of the norm; a zero row of W has g = 1.

    Args:
        vectors: magnitude, lambda_b, lambda_d; also of several layers at once.
        w: row norms of W.
        cross, q: of `update_terms`.
        scaling: c = alpha / rank.
        direction: what the update is added to, "unit" rows or the "weight".
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    magnitude, lambda_b, _ = vectors.to(w.dtype)
    kappa = relative_scale(lambda_b, w, scaling, direction)
    eps = kappa * (2 * cross + kappa * q)
    # Rounding can make a squared norm negative; the floor keeps the gain of a vanishing row finite.
    s = (1 + eps).clamp_min(torch.finfo(w.dtype).eps ** 2).sqrt()
    live = w > 0
    divisor = torch.where(live, w, 1.0)
    if detach_norm:
        eps, s, divisor = eps.detach(), s.detach(), divisor.detach()
    mu = magnitude / divisor
    gain_minus_one = torch.where(live, (mu - 1 - eps / (1 + s)) / s, 0.0)
    scale = magnitude * kappa / s
    if detach_norm and w.requires_grad:
        # Of beta = kappa w only the norm below it is left out.
        scale = scale * (w / divisor)
    if direction == "weight":
        scale = torch.where(live, scale, scaling * lambda_b)
    return RowFactors(gain_minus_one, scale, torch.where(live, mu / s, 1.0).detach())


def combine(
    base_output: Float[Tensor, "*T O"],
    low: Float[Tensor, "*T O"],
    gain_minus_one: Float[Tensor, "*B O"],
    scale: Float[Tensor, "*B O"] | None,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "*T O"]:
    """`g x W^T + scale low + bias` from a base output that already holds the bias; in the base output's dtype.

    The gain enters as `g` on the outputs and as `g - 1` on the bias, so that `g = 1` returns the base's own bits.
    Several adapters on one weight add up: pass the sums of their scaled low-rank products and of their `g - 1`.

    Args:
        base_output: `x W^T + bias`.
        low: `(x A'^T) B^T`.
        gain_minus_one, scale: of the rows of W, in float32 or float64: for all tokens, or for each row of the batch
            with ones in between. Without a scale, low is scaled already.
        bias: the base's, or None.
    """
    y = base_output * (1 + gain_minus_one) + (low if scale is None else scale * low)
    if bias is not None:
        y = y - gain_minus_one * bias
    return as_dtype(y, base_output.dtype)


def rescaled_delta(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    lambda_d: Float[Tensor, "*G R"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
) -> Float[Tensor, "O I"]:
    """`W' - W = (g - 1) W + g beta B A'`, dense, in the dtype of the gain; exactly zero if untrained."""
    return gain_minus_one[:, None] * weight.to(scale.dtype) + (scale[:, None] * B) @ scaled_columns(A, lambda_d)


def row_angle(kappa: Float[Tensor, "O"], cross: Float[Tensor, "O"], q: Float[Tensor, "O"]) -> Float[Tensor, "O"]:
    """Angle between each row of W and the same row of V', in radians; zero for a zero row of W."""
    # atan2 of the components across and along the row: arccos would lose half the digits of a small angle.
    across = kappa.abs() * (q - cross.square()).clamp_min(0).sqrt()
    return torch.atan2(across, 1 + kappa * cross)


def gain(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "O"]:
    """`g = m / n` of every row; one for a zero row of W.

    Args:
        weight: W, (O, I).
        A, B: shared matrices, in the dtype of the vectors.
        vectors: magnitude, lambda_b, lambda_d; this (G, R) for G groups of columns.
        scaling: c = alpha / rank.
        direction: what the update is added to, "unit" rows or the "weight".
        detach_norm: leave the gradient through n out (DoRA, section 4.3).
    """
    return 1 + _factors(weight, A, B, vectors, scaling, direction, detach_norm).gain_minus_one


def dvora_linear(
    x: Float[Tensor, "*T I"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None,
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
) -> Float[Tensor, "*T O"]:
    """`torch.nn.functional.linear(x, weight, bias)` with the weight adapted. Other arguments as for `gain`."""
    factors = _factors(weight, A, B, vectors, scaling, direction, detach_norm)
    low = (x @ scaled_columns(A, vectors.lambda_d).to(x.dtype).T) @ B.to(x.dtype).T
    return combine(torch.nn.functional.linear(x, weight, bias), low, factors.gain_minus_one, factors.scale, bias)


def delta_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W' - W`, dense, in the dtype of the vectors. Arguments as for `gain`."""
    factors = _factors(weight, A, B, vectors, scaling, direction, detach_norm=False)
    return rescaled_delta(weight, A, B, vectors.lambda_d, factors.gain_minus_one, factors.scale)


def merged_weight(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
) -> Float[Tensor, "O I"]:
    """`W'`, dense, in the dtype of the vectors; W to the last bit if untrained. Arguments as for `gain`."""
    delta = delta_weight(weight, A, B, vectors, scaling=scaling, direction=direction)
    return weight.to(delta.dtype) + delta


def _factors(
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    scaling: float,
    direction: Direction,
    detach_norm: bool,
) -> RowFactors:
    """The factors of the rows, from the whole layer, in the dtype of A and B."""
    w = row_norm(as_dtype(weight, A.dtype))
    terms = update_terms(weight, w, A, B, vectors.lambda_d)
    return row_factors(vectors, w, *terms, scaling=scaling, direction=direction, detach_norm=detach_norm)
