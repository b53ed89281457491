"""The product with a constant matrix and a factor, which costs no pass over the values of its own."""

from typing import Any

import torch
from torch import Tensor

from .shapes import Float
from .transforms import recording, transforming


def scaled_product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    """`scale a b`."""
    autocast = torch.is_autocast_enabled(a.device.type)
    if a.dtype.itemsize < 4 or autocast or transforming() or (b.requires_grad and recording()):
        # Scaled before the product: in float16 the unscaled sum of a wide input would overflow.
        return (a * scale) @ b
    if not (a.requires_grad and recording()):
        return _product(a, b, scale)
    product: Tensor = _ScaledProduct.apply(a, b, scale)
    return product


def _product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    product = torch.addmm(b[0], a.reshape(-1, a.shape[-1]), b, beta=0, alpha=scale)
    return product.view(*a.shape[:-1], b.shape[1])


class _ScaledProduct(torch.autograd.Function):
    """`scale a b` for a constant b: the scale is part of the product in both directions."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(b)
        return _product(a, b, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (b,) = ctx.saved_tensors
        return scaled_product(gradient, b.T, ctx.scale), None, None
