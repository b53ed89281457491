"""The thin products of `linear` on CUDA, those of the outputs' size in one Triton kernel each way.

Dimensions: T tokens, O out, R rank.
"""

import torch
from torch import Tensor

from ..matrices.dense import DenseMatrices
from ..matrices.interface import Matrices
from ..method.packed_factors import PackedFactors
from ..ops.annotations import Float
from ..ops.chunked import sum_of_products
from ..ops.dtypes import as_dtype


def outputs(
    base_output: Float[Tensor, "T O"],
    z: Float[Tensor, "T R"],
    packed: PackedFactors,
    matrices: Matrices,
    bias: Float[Tensor, "O"] | None,
) -> Float[Tensor, "T O"]:
    """The adapted outputs.

    Args:
        base_output: `x W^T + bias`.
        z: `x A^T`.
        packed: the factors of the rows, and lambda_d.
        matrices: A and B.
        bias: the base's, or None.
    """
    from ..ops.triton.combine import combine

    gain_minus_one, scale = packed.trained.detach().unbind()
    low = matrices.expand(z * as_dtype(packed.lambda_d.detach(), z.dtype), base_output.shape[1])
    return combine(base_output, low, gain_minus_one, scale, bias)


def gradients(
    grad_output: Float[Tensor, "T O"],
    base_output: Float[Tensor, "T O"],
    z: Float[Tensor, "T R"],
    packed: PackedFactors,
    matrices: Matrices,
    bias: Float[Tensor, "O"] | None,
) -> tuple[Float[Tensor, "T O"], Float[Tensor, "T R"], Float[Tensor, "R"], Float[Tensor, "2 O"]]:
    """The gradients of the base's outputs, of z, of lambda_d, and of `g - 1` and the scale."""
    from ..ops.triton.combine import combine_backward

    gain_minus_one, scale = packed.trained.detach().unbind()
    inner = as_dtype(packed.lambda_d.detach(), z.dtype)
    low = matrices.expand(z * inner, grad_output.shape[1]) if matrices.products_are_cheap else None
    found = combine_backward(grad_output, base_output, low, gain_minus_one, scale, bias)
    d_scale = found.scale
    if d_scale is None:
        assert isinstance(matrices, DenseMatrices)
        _, d_scale = matrices.update_products(as_dtype(grad_output, z.dtype), z, inner, scale)
    h = matrices.expand_transpose(as_dtype(found.scaled, z.dtype), z.shape[1])
    d_lambda_d = sum_of_products(h, z)
    return found.base, h.mul_(inner), d_lambda_d, torch.stack([found.gain, d_scale])
