"""The factors of the rows as an autograd function with closed-form gradients; it saves vectors, and a small half_dq.

In the units of `functional.row_change` (u, b and h are of the order of one, whatever the vectors are):

g = m / (k h),   scale = g beta = m b / h,   h**2 = u**2 + 2 b cross / k + b**2 q

dL/dh       = -(g dL/dg + scale dL/dscale) / h
dL/dm       = (dL/dg / k + b dL/dscale) / h
dL/dbeta    = g dL/dscale + dL/dh (cross / k + b q) / (k h)
dL/dlambda_d through cross (dL/dh b / (k h)) and q (dL/dh b**2 / (2 h))
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.dtypes import without_autocast
from ..ops.tracing import grad_recorded
from . import functional as F
from .functional import RowFactors, Vectors, indices_if_any, measured_ratio, nearly_cancelled, row_change
from .norm import FrozenNorm


def row_factors(vectors: Vectors, norm: FrozenNorm, beta: Float[Tensor, "O"], detach_norm: bool = False) -> RowFactors:
    """`functional.row_factors` for a frozen weight."""
    if not grad_recorded():
        return F.row_factors(vectors, norm, beta)
    gain_minus_one, scale, gain, near = _RowFactors.apply(vectors.magnitude, beta, vectors.lambda_d, norm, detach_norm)
    factors = RowFactors(gain_minus_one, scale, gain, beta)
    rows = indices_if_any(near)
    return factors if rows is None or norm.matrix is None else _with_measured(rows, factors, vectors, norm, detach_norm)


def _with_measured(
    rows: Tensor, factors: RowFactors, vectors: Vectors, norm: FrozenNorm, detach_norm: bool
) -> RowFactors:
    """The factors, with those of some rows computed from V' itself."""
    w, beta = norm.w[rows], factors.beta[rows]
    with torch.set_grad_enabled(not detach_norm):
        updated = norm.updated_rows(rows, beta, vectors.lambda_d)
        assert updated is not None
        n = w * measured_ratio(updated, w)
    g = vectors.magnitude[rows] / n
    measured = RowFactors(g - 1, g * beta, g.detach(), beta)
    return RowFactors(
        *(
            of_all.index_copy(0, rows, of_rows.to(of_all.dtype))
            for of_all, of_rows in zip(factors, measured, strict=True)
        )
    )


class _RowFactors(torch.autograd.Function):
    """`g - 1` and `g beta`; and, not differentiable, `g` and which rows nearly cancel."""

    @staticmethod
    def forward(
        ctx: Any, magnitude: Tensor, beta: Tensor, lambda_d: Tensor, norm: FrozenNorm, detach_norm: bool
    ) -> tuple[Tensor, ...]:
        half_dq = norm.half_dq(lambda_d) if ctx.needs_input_grad[2] and not detach_norm else None
        cross, q = norm.terms(lambda_d, half_dq)
        change = row_change(norm.w, cross, q, beta)
        factors = F.factors_of_change(magnitude, norm.w, beta, change)
        ctx.norm, ctx.detach_norm = norm, detach_norm
        # Save the weight where backward reads it again, so that autograd refuses one that was written to in between.
        read_again = norm.matrix if norm.C is None else None
        inner = cross / change.k + change.b * q
        kept = (magnitude, beta, lambda_d, factors.gain, factors.scale, *change, inner, half_dq, read_again)
        ctx.save_for_backward(*kept)
        near = nearly_cancelled(change)
        ctx.mark_non_differentiable(factors.gain, near)
        return factors.gain_minus_one, factors.scale, factors.gain, near

    @staticmethod
    @without_autocast
    def backward(ctx: Any, d_gain: Tensor, d_scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        magnitude, beta, lambda_d, gain, scale, k, u, b, change, h, inner, half_dq, _ = ctx.saved_tensors
        norm: FrozenNorm = ctx.norm
        if torch.is_grad_enabled():
            return _differentiable_gradients(d_gain, d_scale, magnitude, beta, lambda_d, norm, ctx.detach_norm)
        live = norm.w > 0
        d_magnitude = torch.where(live, (d_gain / k + b * d_scale) / h, 0.0)
        # The scale of a zero row is beta itself.
        d_beta = torch.where(live, gain * d_scale, d_scale)
        if ctx.detach_norm:
            return d_magnitude, d_beta, None, None, None
        # At its floor the norm is constant.
        moves = live & (change > -u.square())
        d_h = torch.where(moves, -(gain * d_gain + scale * d_scale) / h, 0.0)
        d_beta = d_beta + d_h * inner / (k * h)
        d_lambda_d = norm.terms_gradient(d_h * b / (k * h), d_h * b.square() / (2 * h), lambda_d, half_dq)
        return d_magnitude, d_beta, d_lambda_d, None, None


def _differentiable_gradients(
    d_gain: Tensor,
    d_scale: Tensor,
    magnitude: Tensor,
    beta: Tensor,
    lambda_d: Tensor,
    norm: FrozenNorm,
    detach_norm: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph, for derivatives of higher order."""
    factors = F.row_factors(Vectors(magnitude, beta, lambda_d), norm, beta, detach_norm)
    inputs = [t for t in (magnitude, beta, lambda_d) if t.requires_grad]
    outputs, gradients = (factors.gain_minus_one, factors.scale), (d_gain, d_scale)
    found = iter(torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True))
    return *(next(found) if t.requires_grad else None for t in (magnitude, beta, lambda_d)), None, None
