"""A linear layer in training by way of its updated weight V', which costs less than thin products with many tokens.

Dimensions: T tokens, I in, O out, R rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..matrices.dense import DenseMatrices
from ..matrices.interface import Matrices
from ..method import functional as F
from ..ops.annotations import Float
from ..ops.dtypes import without_autocast
from ..ops.tracing import grad_recorded, is_traced
from .linear import ThinProducts, Update, project, token_list


def updated_linear(update: Update, layer: nn.Linear, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T O"]:
    """The output by way of the updated weight V', where `takes_updated_weight` says so."""
    adapted, packed, bias = update.adapted, update.factors.packed, layer.bias
    assert update.vectors is not None
    vectors = update.vectors.to(adapted.w.dtype)
    beta = F.row_scale(vectors.lambda_b, adapted.w, adapted.scaling, adapted.direction)
    z = project(adapted, x)
    updated = _UpdatedLinear.apply(x, z, layer.weight, bias, vectors.lambda_d, beta, update.matrices)
    y: Tensor = ThinProducts.apply(updated, None, vectors.lambda_d.detach(), packed.trained, bias, update)
    return y


WORTH_IT = 2.0
"""Required saving in multiply-adds: passes of the weight's size are bound by memory."""


def takes_updated_weight(layer: nn.Module, x: Tensor, matrices: Matrices) -> bool:
    """Whether training goes through the updated weight.

    Args:
        layer: the base.
        x: its inputs.
        matrices: the adapter's A and B.
    """
    if is_traced() or not (grad_recorded() and isinstance(matrices, DenseMatrices) and type(layer) is nn.Linear):
        return False
    out_features, in_features = layer.out_features, layer.in_features
    if not pays(x.numel() // max(1, in_features), out_features, in_features) or not _is_plain(layer):
        return False
    # In half precision small updates would round away.
    wide = layer.weight.dtype in (torch.float32, torch.float64) and x.dtype == layer.weight.dtype
    return wide and not layer.weight.requires_grad and not torch.is_autocast_enabled(x.device.type)


def pays(tokens: int, out_features: int, in_features: int) -> bool:
    """The cost model, in multiply-adds per rank: `z B^T`, its transpose and `h A`, against forming V' twice."""
    thin = tokens * (2 * out_features + in_features)
    updated = 2 * out_features * in_features
    return thin > WORTH_IT * updated


def _is_plain(layer: nn.Linear) -> bool:
    """Whether the layer's forward is the product with its weight, with no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        "forward" not in vars(layer)
        # Checked before the weight is accessed, which DeepSpeed's hooks would gather.
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not layer.weight.is_meta
    )


class _UpdatedLinear(torch.autograd.Function):
    """`x V'^T + bias` by `V' = W + diag(beta) B diag(lambda_d) A`, which is formed again in the backward pass.

    dL/dx = grad_output V',   M = grad_output^T z,   dL/dbeta = rowsum(M * B diag(lambda_d)),
    dL/dlambda_d = colsum(diag(beta) B * M)

    z gets no gradient: dx already includes this path.
    """

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
        return nn.functional.linear(x, matrices.updated(weight, lambda_d, beta), bias)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, lambda_d, beta = ctx.saved_tensors
        matrices: DenseMatrices = ctx.matrices
        needed, rows = ctx.needs_input_grad, token_list(grad_output)
        d_x = grad_output @ matrices.updated(weight, lambda_d, beta) if needed[0] else None
        d_lambda_d = d_beta = None
        if needed[4] or needed[5]:
            d_lambda_d, d_beta = matrices.update_products(rows, token_list(z), lambda_d, beta)
        d_bias = rows.sum(0) if needed[3] else None
        return d_x, None, None, d_bias, d_lambda_d, d_beta, None
