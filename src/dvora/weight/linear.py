"""The outputs of a linear layer with an adapted weight: from those of its base, or from the updated weight.

Dimensions: T tokens, I in, O out, R rank; of a weight that processes divide, those of the part that this one holds.
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
    """The output, from that of the base.

    Args:
        adapted: the weight.
        base_output: `x W^T + bias`.
        x: the inputs of the update.
        lambda_d: the trained vector.
        factors: of this adapter.
        bias: the base's, or None.
        small: rows that are small beside their bias.

    Raises:
        TypeError, ValueError: inputs or outputs are not those of the part of the weight.
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
    """The output by way of the updated weight; for a strength of one (`routes`)."""
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
    """`x A^T`, made once for layers that read the same inputs."""
    part, shared = adapted.shard, adapted.shared
    if part is not None and part.inputs is not None:
        return part.z(projected(x, adapted.rank, adapted.matrices))
    z = shared.project_once(x, adapted.rank, adapted)
    return z if part is None else part.z(z)


WORTH_IT = 2.0
"""By how much the thin products must exceed the updated weight in multiply-adds: those of W's size wait for memory."""


def takes_updated_weight(layer: nn.Module, x: Tensor, matrices: Matrices) -> bool:
    """Whether training goes through the updated weight.

    Args:
        layer: the base; its weight is frozen.
        x: inputs, which nothing but the layer itself changes.
        matrices: of the adapter.
    """
    if is_traced() or not (grad_recorded() and isinstance(matrices, DenseMatrices) and _is_plain(layer)):
        return False
    assert isinstance(layer, nn.Linear)
    # Half precision would round small updates away.
    wide = layer.weight.dtype in (torch.float32, torch.float64) and x.dtype == layer.weight.dtype
    if not wide or layer.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    out_features, in_features = layer.weight.shape
    return pays(x.numel() // max(1, in_features), out_features, in_features)


def pays(tokens: int, out_features: int, in_features: int) -> bool:
    """The cost model, in multiply-adds by rank: `z B^T`, its transpose and `h A`, against V' made twice."""
    thin = tokens * (2 * out_features + in_features)
    updated = 2 * out_features * in_features
    return thin > WORTH_IT * updated


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer's forward is the product with its weight and nothing listens to it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        # Before its weight is asked for, which DeepSpeed's hooks would gather.
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not layer.weight.is_meta
    )
