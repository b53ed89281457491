"""The rescaled output of the base plus the scaled update, as one autograd function with closed-form gradients.

    y = y_b + (g - 1) (y_b - bias) + scale ((z lambda_d) B^T)        y_b = x W^T + bias

(Without z there is no update: a layer with a magnitude only, or an output that includes its update already.)

    dL/dy_b      = g grad_output
    dL/d(g - 1)  = sum_t grad_output (y_b - bias)
    dL/dscale    = sum_t grad_output ((z lambda_d) B^T)
    h            = (grad_output scale) B,   dL/dz = h lambda_d,   dL/dlambda_d = sum_t h z

For the backward pass it saves y_b and z, not the layer's inputs or the update.
"""

from typing import Any

import torch
from torch import Tensor

from ..matrices.interface import Matrices
from ..ops.annotations import Float
from ..ops.chunked import rescaled, sum_of_products
from ..ops.dtypes import as_dtype, norm_dtype, without_autocast
from ..ops.tracing import grad_recorded


def combine(
    base_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"] | None,
    lambda_d: Float[Tensor, "R"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
    matrices: Matrices,
    gain: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*T O"]:
    """`y`, in the dtype of the base's output.

    Args:
        base_output: y_b, with its bias.
        z: `x A^T`, or None for no update.
        lambda_d: the trained vector.
        gain_minus_one: `g - 1`, float32 or float64.
        scale: `g beta`, of each output of the update.
        bias: the base's, or None.
        matrices: those of B.
        gain: g, more precise than `1 + gain_minus_one` where it is far below one; None computes it from there.
    """
    if grad_recorded():
        y: Tensor = _Combine.apply(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices, gain)
        return y
    return _forward(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices, gain)


def _forward(
    base_output: Tensor,
    z: Tensor | None,
    lambda_d: Tensor,
    gain_minus_one: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    matrices: Matrices,
    gain: Tensor | None = None,
) -> Tensor:
    if z is None:
        return _rescaled(base_output, gain_minus_one, bias, gain)
    scaled = z * as_dtype(lambda_d, z.dtype)
    if matrices.use_triton and base_output.is_cuda:
        return _forward_in_triton(base_output, scaled, gain_minus_one, scale, bias, matrices)
    y = as_dtype(matrices.expand(scaled, base_output.shape[-1], scale), base_output.dtype)
    gain = 1 + gain_minus_one if gain is None else gain
    offset = None if bias is None else gain_minus_one * bias
    if y.dtype.itemsize < 4:
        # In half precision a gain near one would round to one.
        return rescaled(base_output, gain, offset, y)
    y.addcmul_(base_output, gain)
    return y if offset is None else y.sub_(offset)


def _rescaled(tokens: Tensor, gain_minus_one: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """`tokens + (g - 1) (tokens - bias)`: outputs without an update, and gradients of the base's outputs."""
    # The saved gain is a constant: higher-order derivatives go through `gain_minus_one`.
    gain = 1 + gain_minus_one if gain is None or torch.is_grad_enabled() else gain
    offset = None if bias is None else gain_minus_one * bias
    if tokens.dtype.itemsize < 4 and not torch.is_grad_enabled():
        return rescaled(tokens, gain, offset)
    y = tokens * gain
    return (y if offset is None else y.sub_(offset)).to(tokens.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_output: Tensor,
        z: Tensor | None,
        lambda_d: Tensor,
        gain_minus_one: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        matrices: Matrices,
        gain: Tensor | None,
    ) -> Tensor:
        ctx.matrices = matrices
        ctx.save_for_backward(base_output, z, lambda_d, gain_minus_one, scale, bias, gain)
        return _forward(base_output, z, lambda_d, gain_minus_one, scale, bias, matrices, gain)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        base_output, z, lambda_d, gain_minus_one, scale, bias, gain = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if z is not None and ctx.matrices.use_triton and grad_output.is_cuda and not torch.is_grad_enabled():
            inputs = (base_output, z, lambda_d, gain_minus_one, scale, bias)
            return *_backward_in_triton(grad_output, *inputs, ctx.matrices), None, None
        d_base = _rescaled(grad_output, gain_minus_one, None, gain) if needed[0] else None
        d_z = d_lambda_d = d_gain = d_scale = None
        if z is not None:
            d_z, d_lambda_d, d_scale = _update_gradients(grad_output, z, lambda_d, scale, ctx.matrices, needed)
        if needed[3]:
            d_gain = sum_of_products(_rows(grad_output), _rows(base_output))
            if bias is not None:
                d_gain = d_gain - _total(grad_output) * bias
        d_bias = -gain_minus_one * _total(grad_output) if needed[5] else None
        return d_base, d_z, d_lambda_d, d_gain, d_scale, d_bias, None, None


def _update_gradients(
    grad_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"],
    lambda_d: Float[Tensor, "R"],
    scale: Float[Tensor, "O"],
    matrices: Matrices,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients with respect to z, lambda_d and the scale, where needed."""
    grad_output, inner = grad_output.to(z.dtype), lambda_d.to(z.dtype)
    d_z = d_lambda_d = d_scale = None
    if needed[4]:
        d_scale = matrices.row_products(_rows(grad_output), _rows(z * inner))
    if needed[1] or needed[2]:
        h = matrices.expand_transpose(grad_output, z.shape[-1], scale)
        d_lambda_d = sum_of_products(_rows(h), _rows(z)) if needed[2] else None
        if needed[1]:
            d_z = h * inner if torch.is_grad_enabled() else h.mul_(inner)
    return d_z, d_lambda_d, d_scale


def _forward_in_triton(
    base_output: Float[Tensor, "*T O"],
    scaled_z: Float[Tensor, "*T R"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
    matrices: Matrices,
) -> Float[Tensor, "*T O"]:
    from ..ops.triton import combine as fused

    low_rank = _rows(matrices.expand(scaled_z, base_output.shape[-1]))
    return fused.combine(_rows(base_output), low_rank, gain_minus_one, scale, bias).view_as(base_output)


def _backward_in_triton(
    grad_output: Float[Tensor, "*T O"],
    base_output: Float[Tensor, "*T O"],
    z: Float[Tensor, "*T R"],
    lambda_d: Float[Tensor, "R"],
    gain_minus_one: Float[Tensor, "O"],
    scale: Float[Tensor, "O"],
    bias: Float[Tensor, "O"] | None,
    matrices: Matrices,
) -> tuple[Tensor | None, ...]:
    """All gradients; those of the outputs' size in one pass over memory."""
    from ..ops.triton import combine as fused

    out_features, inner = grad_output.shape[-1], lambda_d.to(z.dtype)
    scaled_z = _rows(z * inner)
    low_rank = matrices.expand(scaled_z, out_features) if matrices.products_are_cheap else None
    found = fused.combine_backward(_rows(grad_output), _rows(base_output), low_rank, gain_minus_one, scale, bias)
    d_scale = matrices.row_products(_rows(grad_output).to(z.dtype), scaled_z) if found.scale is None else found.scale
    h = matrices.expand_transpose(found.scaled.to(z.dtype), z.shape[-1])
    d_lambda_d = sum_of_products(h, _rows(z))
    d_bias = None if bias is None else -gain_minus_one * _total(grad_output)
    return found.base.view_as(grad_output), h.mul_(inner).view_as(z), d_lambda_d, found.gain, d_scale, d_bias


def _total(grad_output: Float[Tensor, "*T O"]) -> Float[Tensor, "O"]:
    return _rows(grad_output).sum(0, dtype=norm_dtype(grad_output.dtype))


def _rows(tokens: Float[Tensor, "*T N"]) -> Float[Tensor, "S N"]:
    return tokens.reshape(-1, tokens.shape[-1])
