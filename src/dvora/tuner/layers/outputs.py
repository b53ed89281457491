"""The outputs of a layer of any type from those of its base and its active adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import functional as F
from ...factors import Factors
from ...layer import thin_outputs
from ...tensors import Float, local
from ...weight import AdaptedWeight
from .layer_types import LayerType
from .low_rank import linear


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer, or those of the rows of a batch, which share A and B."""

    adapted: AdaptedWeight
    factors: Factors
    dropout: nn.Module | None
    """Of the inputs of the update; None where nothing is dropped."""


def adapted_outputs(
    base_layer: nn.Module,
    layer_type: LayerType,
    x: Tensor,
    base_output: Tensor,
    adapters: Sequence[ActiveAdapter],
    bias: Tensor | None,
) -> Tensor:
    """The outputs of the base with the updates of all adapters added up, in the memory format of the base's output.

    Raises:
        TypeError, ValueError: the weight is sharded in a way that is not supported.
    """
    for adapter in adapters:
        _check_part(adapter, x, base_output)
    if len(adapters) == 1 and layer_type.low_rank is linear:
        adapted, factors, dropout = adapters[0]
        return thin_outputs(base_output, x if dropout is None else dropout(x), adapted, factors, bias)
    features = -1 - layer_type.spatial
    outputs = base_output.movedim(features, -1)
    updates = [_update(base_layer, layer_type, x, outputs, adapter) for adapter in adapters]
    gains = [adapter.factors.gain_minus_one for adapter in adapters]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), None, bias)
    return summed.movedim(-1, features)


def _update(
    base_layer: nn.Module, layer_type: LayerType, x: Tensor, outputs: Tensor, adapter: ActiveAdapter
) -> Float[Tensor, "*T O"]:
    """`scale low` of one adapter."""
    assert layer_type.low_rank is not None
    adapted, factors, dropout = adapter
    if not adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    low = layer_type.low_rank(adapted, base_layer, x, factors.lambda_d, nn.Identity() if dropout is None else dropout)
    return factors.scale * laid_out_like(outputs, low)


def _check_part(adapter: ActiveAdapter, x: Tensor, base_output: Tensor) -> None:
    adapted = adapter.adapted
    if adapted.shard is None:
        return
    adapted.shard.check_sizes(x, base_output, adapted.name)
    if adapter.dropout is not None:
        raise ValueError(
            f"{adapted.name}: every process would drop different inputs of a sharded weight; set dvora_dropout=0"
        )


def bias_of(layer: nn.Module, measured: Tensor | None) -> Tensor | None:
    """The bias of a layer: its own, or the one measured where the layer hides it or is offloaded."""
    bias = getattr(layer, "bias", None)
    return local(bias) if isinstance(bias, Tensor) and not bias.is_meta else measured


def laid_out_like(output: Tensor, update: Tensor) -> Tensor:
    """An update in the memory format of the base's output, so that their sum keeps it (channels_last)."""
    if update.stride() == output.stride():
        return update
    return torch.empty_like(output, dtype=update.dtype).copy_(update)


def check_gradient(layer: nn.Module, layer_type: LayerType, x: Tensor, output: Tensor, name: str) -> None:
    """Refuse to train through a layer whose forward pass has no backward pass.

    Raises:
        RuntimeError: the input requires a gradient, and the output does not.
    """
    if not layer_type.has_weight and torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
        raise RuntimeError(
            f"{name}: the base layer of type {type(layer).__name__} has no backward pass, so the layers before it "
            "would get a wrong gradient; adapt the last layers only, or quantise the base in another way"
        )
