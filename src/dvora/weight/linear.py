"""The outputs of a linear layer with an adapted weight, and which way they are computed.

| situation | way | formed for it |
|---|---|---|
| compiled, exported, under `torch.func` | PyTorch differentiates `functional` | nothing |
| training with many tokens, dense matrices, a plain layer of float32 or float64 | updated weight | V', twice |
| other training, evaluation | two thin products | nothing; in evaluation the gain is cached |
| within `dvora.merged(model)` | the base's forward alone | W', once |

Dimensions: T tokens, I in, O out, R rank; of a sharded weight, those of this process's shard.
"""

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import local
from ..matrices.dense import DenseMatrices
from ..matrices.interface import Matrices, projected
from ..method import functional as F
from ..method.combine import combine
from ..method.functional import RowFactors
from ..method.small_rows import SmallRows
from ..method.updated_weight import updated_linear
from ..ops.annotations import Float
from ..ops.tracing import grad_recorded, is_traced
from .adapted_weight import AdaptedWeight


def combined(
    adapted: AdaptedWeight,
    base_output: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T I"],
    lambda_d: Float[Tensor, "R"],
    factors: RowFactors,
    bias: Float[Tensor, "O"] | None,
    small: SmallRows | None = None,
) -> Float[Tensor, "*T O"]:
    """The output, computed from the base's by two thin products.

    Args:
        adapted: the weight.
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        lambda_d: the trained vector.
        factors: of this adapter.
        bias: the base's, or None.
        small: rows that are small beside their bias.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the weight's shard.
    """
    if adapted.shard is not None:
        adapted.shard.check_sizes(x, base_output, adapted.name)
    if small is not None:
        others = combined(adapted, base_output, x, lambda_d, small.left_out(factors), bias)
        return small.added(others, factors)
    bias = local(bias)
    if is_traced():
        nothing = base_output.new_zeros(1).expand_as(base_output)
        update = factors.scale * low_rank(adapted, x, lambda_d) if adapted.rank else nothing
        return F.combine(base_output, update, factors.gain_minus_one, bias)
    z = _z(adapted, x) if adapted.rank else None
    g1, scale, gain, _ = factors
    return combine(base_output, z, lambda_d, g1, scale, bias, adapted.matrices, gain)


def from_updated_weight(
    adapted: AdaptedWeight,
    layer: nn.Linear,
    x: Float[Tensor, "*T I"],
    lambda_d: Float[Tensor, "R"],
    factors: RowFactors,
) -> Float[Tensor, "*T O"]:
    """The output, computed with the updated weight; for a strength of one, where `takes_updated_weight` says so."""
    matrices = adapted.matrices
    assert isinstance(matrices, DenseMatrices)
    updated = updated_linear(x, _z(adapted, x), layer.weight, layer.bias, lambda_d, factors.beta, matrices)
    g1, scale, gain, _ = factors
    return combine(updated, None, lambda_d, g1, scale, layer.bias, matrices, gain)


def low_rank(adapted: AdaptedWeight, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "R"]) -> Float[Tensor, "*T O"]:
    """`((x A^T) lambda_d) B^T`, in the dtype of `x`."""
    z = _z(adapted, x)
    return adapted.matrices.expand(z * lambda_d.to(z.dtype), len(adapted.w))


def _z(adapted: AdaptedWeight, x: Float[Tensor, "*T I"]) -> Float[Tensor, "*T R"]:
    """`x A^T`, computed once for layers that read the same inputs."""
    shard = adapted.shard
    if shard is not None and shard.inputs is not None:
        return shard.z(projected(x, adapted.rank, adapted.matrices))
    z = adapted.shared.project_once(x, adapted.rank, adapted)
    return z if shard is None else shard.z(z)


WORTH_IT = 2.0
"""Required saving in multiply-adds: passes of the weight's size are bound by memory."""


def takes_updated_weight(layer: nn.Module, x: Tensor, matrices: Matrices) -> bool:
    """Whether training goes through the updated weight.

    Args:
        layer: the base.
        x: its inputs.
        matrices: the adapter's A and B.
    """
    if is_traced() or not (grad_recorded() and isinstance(matrices, DenseMatrices) and _is_plain(layer)):
        return False
    assert isinstance(layer, nn.Linear)
    # In half precision small updates would round away.
    wide = layer.weight.dtype in (torch.float32, torch.float64) and x.dtype == layer.weight.dtype
    if not wide or layer.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    out_features, in_features = layer.weight.shape
    return pays(x.numel() // max(1, in_features), out_features, in_features)


def pays(tokens: int, out_features: int, in_features: int) -> bool:
    """The cost model, in multiply-adds per rank: `z B^T`, its transpose and `h A`, against forming V' twice."""
    thin = tokens * (2 * out_features + in_features)
    updated = 2 * out_features * in_features
    return thin > WORTH_IT * updated


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer's forward is the product with its weight, with no hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        # Checked before the weight is accessed, which DeepSpeed's hooks would gather.
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not layer.weight.is_meta
    )
