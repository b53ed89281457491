"""The product with a constant matrix and a factor, which costs no pass over the values of its own."""

from typing import Any

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.dtypes import as_dtype, without_autocast
from ..ops.tracing import recording, transforming

_FEW_TOKENS = 16
"""For these a pass over the values costs less than what saves it."""


def scaled_product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    """`scale a b`, in the dtype of `a`, whatever that of `b`; under autocast in the dtype of autocast's products."""
    if transforming() or (b.requires_grad and recording()):
        return (a * scale) @ b.to(a.dtype)
    # As autocast does, but before the scale, which then takes a pass over half the bytes.
    if torch.is_autocast_enabled(a.device.type) and a.dtype != torch.float64:
        a = as_dtype(a, torch.get_autocast_dtype(a.device.type))
    if not (a.requires_grad and recording()):
        return _product(a, b, scale)
    product: Tensor = _ScaledProduct.apply(a, b, scale)
    return product


def _product(a: Float[Tensor, "*T M"], b: Float[Tensor, "M N"], scale: float) -> Float[Tensor, "*T N"]:
    b = as_dtype(b, a.dtype)
    if a.numel() <= _FEW_TOKENS * a.shape[-1]:
        return (a * scale) @ b
    # One matrix of tokens: for inputs that are no plain batch, as attention's are, PyTorch would copy b for each text.
    rows = a.reshape(-1, a.shape[-1])
    # In half precision scaled before: in float16 the unscaled sum of a wide input would overflow.
    narrow = a.dtype.itemsize < 4
    product = torch.mm(rows * scale, b) if narrow else torch.addmm(b[0], rows, b, beta=0, alpha=scale)
    # No view in the eyes of autograd, so that callers may change it in place.
    whole: Tensor = torch.ops.aten._unsafe_view(product, [*a.shape[:-1], b.shape[1]])
    return whole


class _ScaledProduct(torch.autograd.Function):
    """`scale a b` for a constant b: the scale is part of the product in both directions, and no cast of b is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(b)
        return _product(a, b, scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (b,) = ctx.saved_tensors
        return scaled_product(gradient, b.T, ctx.scale), None, None
