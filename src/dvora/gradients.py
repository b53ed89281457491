"""The gradients of an adapted linear layer in closed form.

With delta = dL/dy over T tokens, z = x A^T, y0 = x W^T + beta (z lambda_d) B^T and M = delta^T z (O, R):

    dL/dm        = rowsum(delta * y0) / n
    rho = dL/dn  = -g dL/dm
    dL/dbeta     = g ((M * B) lambda_d) + rho (cross + beta q) / n
    dL/dlambda_d = colsum(g beta B * M) + colsum(B * (diag(rho / n) (beta P + beta**2 U) L^T))
    dL/dx        = (delta g) W + ((delta g beta) B lambda_d) A
    dL/dW        = (delta g)^T x + diag(rho / n) V' (+ diag(c lambda_b dL/dbeta / w) W for direction "unit")

The terms with rho are the gradient through the norm; they do not depend on the tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .functional import Direction, NormConstants, Vectors, gain_minus_one, relative_norm, row_scale
from .shapes import Float


class LinearGradients(NamedTuple):
    """Gradients of a loss, in float32 or float64."""

    x: Float[Tensor, "T I"]
    magnitude: Float[Tensor, "O"]
    lambda_b: Float[Tensor, "O"]
    lambda_d: Float[Tensor, "R"]
    weight: Float[Tensor, "O I"] | None
    bias: Float[Tensor, "O"]


@torch.no_grad()
def dvora_linear_backward(
    delta: Float[Tensor, "T O"],
    x: Float[Tensor, "T I"],
    weight: Float[Tensor, "O I"],
    A: Float[Tensor, "R I"],
    B: Float[Tensor, "O R"],
    vectors: Vectors,
    constants: NormConstants,
    *,
    scaling: float = 1.0,
    direction: Direction = "unit",
    detach_norm: bool = False,
    train_weight: bool = False,
) -> LinearGradients:
    """Gradients of `functional.dvora_linear`.

    Args:
        delta: gradient of the loss with respect to the outputs.
        x: the inputs of the forward pass.
        weight, A, B, vectors, constants, scaling, direction, detach_norm: as in the forward pass.
        train_weight: also return the dense gradient of W.
    """
    w, P, _, L = constants
    # Products with W run in its own dtype, as the base's do: a wide copy would be as large as the weight.
    base_output = torch.nn.functional.linear(x, weight).to(w.dtype)
    delta, x = delta.to(w.dtype), x.to(w.dtype)
    lambda_d, beta = vectors.lambda_d, row_scale(vectors.lambda_b, w, scaling, direction)
    g = 1 + gain_minus_one(vectors, constants, B, beta)
    _, s = relative_norm(constants, B, lambda_d, beta)
    z = x @ A.T
    y0 = base_output + beta * ((z * lambda_d) @ B.T)

    live = w > 0
    one_over_n = torch.where(live, 1 / torch.where(live, w * s, 1.0), 0.0)
    d_magnitude = (delta * y0).sum(0) * one_over_n
    rho_over_n = torch.zeros_like(w) if detach_norm else -g * d_magnitude * one_over_n

    M, U = delta.T @ z, (B * lambda_d) @ L
    cross, q = (P * U).sum(1), U.square().sum(1)
    d_beta = g * ((M * B) @ lambda_d) + rho_over_n * (cross + beta * q)
    d_update = (rho_over_n * beta)[:, None] * (P + beta[:, None] * U)
    d_lambda_d = ((g * beta)[:, None] * B * M).sum(0) + (B * (d_update @ L.T)).sum(0)
    d_x = ((delta * g).to(weight.dtype) @ weight).to(w.dtype) + (((delta * (g * beta)) @ B) * lambda_d) @ A

    d_weight = None
    if train_weight:
        weight = weight.to(w.dtype)
        adapted = weight + (beta[:, None] * B * lambda_d) @ A
        d_weight = (delta * g).T @ x + rho_over_n[:, None] * adapted
        if direction == "unit":
            d_w = scaling * vectors.lambda_b * d_beta
            d_weight += torch.where(live, d_w / torch.where(live, w, 1.0), 0.0)[:, None] * weight
    d_lambda_b = scaling * d_beta * (w if direction == "unit" else 1.0)
    return LinearGradients(d_x, d_magnitude, d_lambda_b, d_lambda_d, d_weight, delta.sum(0))
