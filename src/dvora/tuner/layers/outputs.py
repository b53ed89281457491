"""The outputs of a layer from those of its base and its active adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...engines.zero3 import weight_in_memory
from ...method import functional as F
from ...method.small_rows import SmallRows
from ...ops.annotations import Float
from ...weight.adapted_weight import AdaptedWeight
from ...weight.linear import Update, adapted_linear
from ...weight.updated_linear import takes_updated_weight, updated_linear
from .base_layer import laid_out_like
from .layer_types import LayerType
from .low_rank import linear


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer."""

    update: Update
    dropout: nn.Module
    is_whole: bool
    """Whether its strength is one."""


def updated_outputs(base_layer: nn.Module, x: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor | None:
    """The outputs from the updated weight, without the base's forward; None where that would be slower or inexact."""
    if len(adapters) != 1:
        return None
    (update, dropout, is_whole), adapted = adapters[0], adapters[0].update.adapted
    alone = is_whole and isinstance(dropout, nn.Identity) and adapted.rank > 0
    if not (alone and takes_updated_weight(base_layer, x, adapted.shared.impl)):
        return None
    assert isinstance(base_layer, nn.Linear)
    return None if adapted.small_rows(base_layer.bias) is not None else updated_linear(update, base_layer, x)


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
    small = _small_rows(base_layer, layer_type, x, adapters[0].update.adapted, bias)
    if len(adapters) == 1 and layer_type.low_rank is linear:
        update, dropout, _ = adapters[0]
        # Calling a module takes as long as a small product.
        inputs = dropout(x) if dropout.training else x
        return adapted_linear(update, base_output, inputs, bias, small)
    features = -1 - layer_type.spatial
    outputs = base_output.movedim(features, -1)
    own = [adapter.update.factors.packed.rows for adapter in adapters]
    every = own if small is None else [small.left_out(factors) for factors in own]
    products = [_product(base_layer, layer_type, x, outputs, adapter) for adapter in adapters]
    updates = [factors.scale * product for factors, product in zip(every, products, strict=True)]
    gains = [factors.gain_minus_one for factors in every]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), bias)
    if small is not None:
        for factors in own:
            summed = small.added(summed, factors)
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
    update = adapter.update
    if not update.adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    product = layer_type.low_rank(update.adapted, base_layer, x, update.factors.packed.lambda_d, adapter.dropout)
    return laid_out_like(outputs, product)


def _check_part(adapter: ActiveAdapter, x: Tensor, base_output: Tensor) -> None:
    adapted = adapter.update.adapted
    if adapted.shard is None:
        return
    adapted.shard.check_sizes(x, base_output, adapted.name)
    if adapter.dropout.training and not isinstance(adapter.dropout, nn.Identity):
        raise ValueError(
            f"{adapted.name}: every process would drop different inputs of a sharded weight; set dvora_dropout=0"
        )
