"""The outputs of a layer from those of its base and its active adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...engines.zero3 import weight_in_memory
from ...method import functional as F
from ...method.functional import RowFactors, Vectors
from ...method.small_rows import SmallRows
from ...ops.annotations import Float
from ...weight.adapted_weight import AdaptedWeight
from ...weight.linear import combined, from_updated_weight, takes_updated_weight
from .base_layer import laid_out_like
from .layer_types import LayerType
from .low_rank import linear
from .vectors import Strength


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer."""

    adapted: AdaptedWeight
    vectors: Vectors
    factors: RowFactors
    dropout: nn.Module
    strength: Strength


def updated_outputs(base_layer: nn.Module, x: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor | None:
    """The outputs from the updated weight, without the base's forward; None where that would be slower or inexact."""
    if len(adapters) != 1:
        return None
    adapted, vectors, factors, dropout, strength = adapters[0]
    alone = isinstance(dropout, nn.Identity) and adapted.rank > 0
    if not (alone and takes_updated_weight(base_layer, x, adapted.shared.impl) and strength.number == 1):
        return None
    assert isinstance(base_layer, nn.Linear)
    if adapted.small_rows(base_layer.bias) is not None:
        return None
    return from_updated_weight(adapted, base_layer, x, vectors.lambda_d, factors)


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
    small = _small_rows(base_layer, layer_type, x, adapters[0].adapted, bias)
    if len(adapters) == 1 and layer_type.low_rank is linear:
        adapted, vectors, factors, dropout, _ = adapters[0]
        # Calling a module takes as long as a small product.
        inputs = dropout(x) if dropout.training else x
        return combined(adapted, base_output, inputs, vectors.lambda_d, factors, bias, small)
    features = -1 - layer_type.spatial
    outputs = base_output.movedim(features, -1)
    every = [adapter.factors if small is None else small.left_out(adapter.factors) for adapter in adapters]
    products = [_product(base_layer, layer_type, x, outputs, adapter) for adapter in adapters]
    updates = [factors.scale * product for factors, product in zip(every, products, strict=True)]
    gains = [factors.gain_minus_one for factors in every]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), bias)
    if small is not None:
        for adapter in adapters:
            summed = small.added(summed, adapter.factors)
    return summed.movedim(-1, features)


def _small_rows(
    base_layer: nn.Module, layer_type: LayerType, x: Tensor, adapted: AdaptedWeight, bias: Tensor | None
) -> SmallRows | None:
    """The rows that are small compared to their bias, with their own products; they are the same for all adapters."""
    rows = adapted.small_rows(bias)
    if rows is None:
        return None
    weight = weight_in_memory(base_layer, "weight") if layer_type.row_products is not None else None
    if weight is None or layer_type.row_products is None:
        return SmallRows(rows, None)
    return SmallRows(rows, layer_type.row_products(base_layer, x, layer_type.layout.matrix(weight)[rows], rows))


def _product(
    base_layer: nn.Module, layer_type: LayerType, x: Tensor, outputs: Tensor, adapter: ActiveAdapter
) -> Float[Tensor, "*T O"]:
    """The inputs through A, lambda_d and B of one adapter."""
    assert layer_type.low_rank is not None
    if not adapter.adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    product = layer_type.low_rank(adapter.adapted, base_layer, x, adapter.vectors.lambda_d, adapter.dropout)
    return laid_out_like(outputs, product)


def _check_part(adapter: ActiveAdapter, x: Tensor, base_output: Tensor) -> None:
    adapted = adapter.adapted
    if adapted.shard is None:
        return
    adapted.shard.check_sizes(x, base_output, adapted.name)
    if adapter.dropout.training and not isinstance(adapter.dropout, nn.Identity):
        raise ValueError(
            f"{adapted.name}: every process would drop different inputs of a sharded weight; set dvora_dropout=0"
        )
