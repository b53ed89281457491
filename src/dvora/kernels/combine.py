"""The base's output, rescaled, plus the scaled update: one function with its gradients in closed form.

    y = y_b + (g - 1) (y_b - bias) + scale ((z lambda_d) B^T)        y_b = x W^T + bias

    dL/dy_b      = g delta
    dL/d(g - 1)  = sum_t delta (y_b - bias)
    dL/dscale    = sum_t delta ((z lambda_d) B^T)
    h            = (delta scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z

For the backward pass it keeps y_b and z: neither the inputs of the layer nor the update.
"""

from typing import Any

import torch
from torch import Tensor

from ..precision import norm_dtype
from ..projections import Matrices
from ..shapes import Float

_CHUNK_VALUES = 2**18


def combine(
    base_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"],
    lambda_d: Float[Tensor, "R"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
    matrices: Matrices,
) -> Float[Tensor, "*T O"]:
    """`y`, in the dtype of the base's output.

    Args:
        base_output: y_b, with its bias.
        z: `x A^T`.
        lambda_d: the trained vector.
        gain_minus_one: `g - 1`, float32 or float64.
        scale: of every output of the update, `g beta`.
        bias: the base's, or None.
        matrices: those of B.
    """
    if torch.is_grad_enabled():
        y: Tensor = _Combine.apply(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices)
        return y
    return _forward(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices)


def _forward(
    base_output: Tensor,
    z: Tensor,
    lambda_d: Tensor,
    gain_minus_one: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    matrices: Matrices,
) -> Tensor:
    y = matrices.expand(z * lambda_d.to(z.dtype), base_output.shape[-1], scale).to(base_output.dtype)
    if bias is not None:
        y.sub_((gain_minus_one * bias).to(y.dtype))
    if y.dtype.itemsize < 4:
        # A gain near one would vanish in half precision; its distance from one keeps its digits.
        return y.addcmul_(base_output, gain_minus_one.to(y.dtype)).add_(base_output)
    return y.addcmul_(base_output, 1 + gain_minus_one)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        z: Tensor,
        lambda_d: Tensor,
        gain_minus_one: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        matrices: Matrices,
    ) -> Tensor:
        ctx.matrices = matrices
        ctx.save_for_backward(base_output, z, lambda_d, gain_minus_one, scale, bias)
        return _forward(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        base_output, z, lambda_d, gain_minus_one, scale, bias = ctx.saved_tensors
        matrices: Matrices = ctx.matrices
        wants = ctx.needs_input_grad
        d_base = d_z = d_lambda_d = d_gain = d_scale = d_bias = None
        if wants[0]:
            d_base = _rescaled(delta, gain_minus_one)
        if wants[1] or wants[2]:
            h = matrices.expand_transpose(delta.to(z.dtype), z.shape[-1], scale)
            d_lambda_d = _sum_of_products(h, z) if wants[2] else None
            if wants[1]:
                lambda_d = lambda_d.to(h.dtype)
                d_z = h * lambda_d if torch.is_grad_enabled() else h.mul_(lambda_d)
        if wants[3]:
            d_gain = _sum_of_products(delta, base_output)
            if bias is not None:
                d_gain = d_gain - _total(delta) * bias
        if wants[4]:
            d_scale = matrices.row_products(_rows(delta.to(z.dtype)), _rows(z * lambda_d.to(z.dtype)))
        if wants[5]:
            d_bias = -gain_minus_one * _total(delta)
        return d_base, d_z, d_lambda_d, d_gain, d_scale, d_bias, None


def _rescaled(delta: Float[Tensor, "*T O"], gain_minus_one: Float[Tensor, "O"]) -> Float[Tensor, "*T O"]:
    """`g delta`, in the dtype of delta."""
    if delta.dtype.itemsize < 4:
        return torch.addcmul(delta, delta, gain_minus_one.to(delta.dtype))
    return delta * (1 + gain_minus_one)


def _sum_of_products(a: Float[Tensor, "*T N"], b: Float[Tensor, "*T N"]) -> Float[Tensor, "N"]:
    """`sum_t a b`, summed in float32 or wider."""
    wide = norm_dtype(a.dtype)
    if torch.is_grad_enabled():
        return _rows(a * b).sum(0, dtype=wide)
    # A few tokens at a time: fresh memory for all products would cost more than the products.
    tokens = max(1, _CHUNK_VALUES // a.shape[-1])
    total = torch.zeros(a.shape[-1], dtype=wide, device=a.device)
    for part_a, part_b in zip(_rows(a).split(tokens), _rows(b).split(tokens), strict=True):
        total += (part_a * part_b).sum(0, dtype=wide)
    return total


def _total(delta: Float[Tensor, "*T O"]) -> Float[Tensor, "O"]:
    return _rows(delta).sum(0, dtype=norm_dtype(delta.dtype))


def _rows(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "S N"]:
    return tokens.reshape(-1, tokens.shape[-1])
