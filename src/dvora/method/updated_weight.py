"""A linear layer through its updated weight V', formed for one step: with many tokens cheaper than two thin products.

    V' = W + diag(beta) B diag(lambda_d) A,   y_b = x V'^T + bias

    dL/dx        = grad_output V'
    M            = grad_output^T z
    dL/dbeta     = rowsum(M * B diag(lambda_d)),   dL/dlambda_d = colsum(diag(beta) B * M)

V' is formed again in the backward pass; saved is z, as with the thin products.
"""

from typing import Any

import torch
from torch import Tensor

from ..matrices.dense import DenseMatrices
from ..ops.annotations import Float
from ..ops.dtypes import without_autocast


def updated_linear(
    x: Float[Tensor, "*T I"],
    z: Float[Tensor, "*T R"],
    weight: Float[Tensor, "O I"],
    bias: Float[Tensor, "O"] | None,
    lambda_d: Float[Tensor, "R"],
    beta: Float[Tensor, "O"],
    matrices: DenseMatrices,
) -> Float[Tensor, "*T O"]:
    """`x V'^T + bias`; for `beta = 0` the base's output, bit for bit.

    Args:
        x: inputs.
        z: `x A^T`. No gradient: dx already includes this path.
        weight: W, frozen, float32 or float64.
        bias: the base's, or None.
        lambda_d, beta: as for the norm.
        matrices: those of A and B.
    """
    outputs: Tensor = _UpdatedLinear.apply(x, z, weight, bias, lambda_d, beta, matrices)
    return outputs


class _UpdatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lambda_d: Tensor,
        beta: Tensor,
        matrices: DenseMatrices,
    ) -> Tensor:
        ctx.matrices = matrices
        ctx.save_for_backward(z, weight, lambda_d, beta)
        return torch.nn.functional.linear(x, matrices.updated(weight, lambda_d, beta), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, lambda_d, beta = ctx.saved_tensors
        matrices: DenseMatrices = ctx.matrices
        needed = ctx.needs_input_grad
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        d_x = grad_output @ matrices.updated(weight, lambda_d, beta) if needed[0] else None
        d_lambda_d = d_beta = None
        if needed[4] or needed[5]:
            d_lambda_d, d_beta = matrices.update_products(rows, z.reshape(-1, z.shape[-1]), lambda_d, beta)
        d_bias = rows.sum(0) if needed[3] else None
        return d_x, None, None, d_bias, d_lambda_d, d_beta, None
