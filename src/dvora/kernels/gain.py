"""The gain with its gradient in closed form: vectors are kept for the backward pass, and small slopes of the norm.

n**2 = w**2 + 2 beta cross + beta**2 q,   g = m / n

dL/dm       = dL/dg / n
dL/d(n**2)  = -g dL/dg / (2 n**2)
dL/dbeta    = dL/d(n**2) (2 cross + 2 beta q)
dL/dlambda_d through cross (2 beta dL/d(n**2)) and q (beta**2 dL/d(n**2))
"""

from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..functional import Vectors
from ..norms import FrozenNorm
from ..row_change import measured_change, nearly_cancelled, norm_change
from ..shapes import Float
from ..transforms import recording


def gain_minus_one(
    vectors: Vectors, norm: FrozenNorm, beta: Float[Tensor, "O"], detach_norm: bool = False
) -> Float[Tensor, "O"]:
    """`functional.gain_minus_one` for a frozen weight."""
    if not recording():
        return F.gain_minus_one(vectors, norm, beta)
    fused: Tensor
    eps: Tensor
    fused, eps = _Gain.apply(vectors.magnitude, beta, vectors.lambda_d, norm, detach_norm)
    near = nearly_cancelled(eps)
    if near is None or norm.matrix is None:
        return fused
    with torch.set_grad_enabled(not detach_norm):
        updated = norm.updated_rows(near, beta[near], vectors.lambda_d)
        assert updated is not None
        n = norm.w[near] * measured_change(updated, norm.w[near])
    measured = vectors.magnitude[near] / n - 1
    return fused.index_copy(0, near, measured.to(fused.dtype))


class _Gain(torch.autograd.Function):
    """`g - 1` and `n**2 / w**2 - 1`, of which the second carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, magnitude: Tensor, beta: Tensor, lambda_d: Tensor, norm: FrozenNorm, detach_norm: bool
    ) -> tuple[Tensor, Tensor]:
        slopes = norm.kept_slopes(lambda_d) if ctx.needs_input_grad[2] and not detach_norm else None
        cross, q = norm.terms(lambda_d, slopes)
        eps, s = norm_change(norm.w, cross, q, beta)
        g1 = F.gain_from_norm(magnitude, norm.w, eps, s)
        ctx.norm, ctx.detach_norm = norm, detach_norm
        # The weight, where it is read again, so that autograd refuses one that was written to in between.
        read_again = norm.matrix if norm.C is None else None
        ctx.save_for_backward(magnitude, beta, lambda_d, g1, s, cross + beta * q, slopes, read_again)
        ctx.mark_non_differentiable(eps)
        return g1, eps

    @staticmethod
    def backward(ctx: Any, d_gain: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
        magnitude, beta, lambda_d, g1, s, slope, slopes, _ = ctx.saved_tensors
        norm: FrozenNorm = ctx.norm
        if torch.is_grad_enabled():
            return _differentiable_gradients(d_gain, magnitude, beta, lambda_d, norm, ctx.detach_norm)
        live = norm.w > 0
        one_over_n = torch.where(live, 1 / torch.where(live, norm.w * s, 1.0), 0.0)
        d_magnitude = d_gain * one_over_n
        if ctx.detach_norm:
            return d_magnitude, None, None, None, None
        # At the floor of the norm it does not change.
        moves = s > torch.finfo(s.dtype).eps
        d_squared = torch.where(moves, -(1 + g1) * d_magnitude * one_over_n / 2, 0.0)
        d_beta = 2 * d_squared * slope
        d_lambda_d = norm.terms_gradient(2 * d_squared * beta, d_squared * beta.square(), lambda_d, slopes)
        return d_magnitude, d_beta, d_lambda_d, None, None


def _differentiable_gradients(
    d_gain: Tensor, magnitude: Tensor, beta: Tensor, lambda_d: Tensor, norm: FrozenNorm, detach_norm: bool
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph, for derivatives of higher order."""
    vectors = Vectors(magnitude, beta, lambda_d)
    g1 = F.gain_minus_one(vectors, norm, beta, detach_norm)
    inputs = [t for t in (magnitude, beta, lambda_d) if t.requires_grad]
    found = iter(torch.autograd.grad(g1, inputs, d_gain, create_graph=True, allow_unused=True))
    return *(next(found) if t.requires_grad else None for t in (magnitude, beta, lambda_d)), None, None
