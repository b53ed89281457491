"""The outputs of a layer from those of its base and its active adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...method import functional as F
from ...method.functional import RowFactors, Vectors
from ...method.small_rows import SmallRows
from ...ops.annotations import Float
from ...weight.adapted_weight import AdaptedWeight
from ...weight.layouts import weight_at_hand
from ...weight.linear import combined, from_updated_weight
from ...weight.routes import takes_updated_weight
from .base_layer import laid_out_like
from .layer_types import LayerKind
from .low_rank import linear
from .vectors import Strength


class ActiveAdapter(NamedTuple):
    """One adapter at work on a layer."""

    adapted: AdaptedWeight
    vectors: Vectors
    factors: RowFactors
    dropout: nn.Module
    strength: Strength


def updated_outputs(base_layer: nn.Module, x: Tensor, adapters: Sequence[ActiveAdapter]) -> Tensor | None:
    """The outputs by way of the updated weight, without the base's forward; None where that is not the way to go."""
    if len(adapters) != 1:
        return None
    adapted, vectors, factors, dropout, strength = adapters[0]
    alone = isinstance(dropout, nn.Identity) and adapted.rank > 0
    if not (alone and takes_updated_weight(base_layer, x, adapted.shared.kind) and strength.number == 1):
        return None
    assert isinstance(base_layer, nn.Linear)
    if adapted.small_rows(base_layer.bias) is not None:
        return None
    return from_updated_weight(adapted, base_layer, x, vectors.lambda_d, factors)


def adapted_outputs(
    base_layer: nn.Module,
    kind: LayerKind,
    x: Tensor,
    base_output: Tensor,
    adapters: Sequence[ActiveAdapter],
    bias: Tensor | None,
) -> Tensor:
    """The outputs of the base with the updates of all adapters added up, laid out as the base's are.

    Raises:
        TypeError, ValueError: the weight is divided between processes in a way that is not supported.
    """
    for adapter in adapters:
        _check_part(adapter, x, base_output)
    small = _small_rows(base_layer, kind, x, adapters[0].adapted, bias)
    if len(adapters) == 1 and kind.low_rank is linear:
        adapted, vectors, factors, dropout, _ = adapters[0]
        # A module's call takes as long as a small product.
        inputs = dropout(x) if dropout.training else x
        return combined(adapted, base_output, inputs, vectors.lambda_d, factors, bias, small)
    features = -1 - kind.spatial
    outputs = base_output.movedim(features, -1)
    every = [adapter.factors if small is None else small.left_out(adapter.factors) for adapter in adapters]
    products = [_product(base_layer, kind, x, outputs, adapter) for adapter in adapters]
    updates = [factors.scale * product for factors, product in zip(every, products, strict=True)]
    gains = [factors.gain_minus_one for factors in every]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), bias)
    if small is not None:
        for adapter in adapters:
            summed = small.added(summed, adapter.factors)
    return summed.movedim(-1, features)


def _small_rows(
    base_layer: nn.Module, kind: LayerKind, x: Tensor, adapted: AdaptedWeight, bias: Tensor | None
) -> SmallRows | None:
    """The rows that are small beside their bias, and what they make of the inputs; all adapters have the same ones."""
    rows = adapted.small_rows(bias)
    if rows is None:
        return None
    weight = weight_at_hand(base_layer, "weight") if kind.row_products is not None else None
    if weight is None or kind.row_products is None:
        return SmallRows(rows, None)
    return SmallRows(rows, kind.row_products(base_layer, x, kind.layout.matrix(weight)[rows], rows))


def _product(
    base_layer: nn.Module, kind: LayerKind, x: Tensor, outputs: Tensor, adapter: ActiveAdapter
) -> Float[Tensor, "*T O"]:
    """The inputs through A, lambda_d and B of one adapter."""
    assert kind.low_rank is not None
    if not adapter.adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    product = kind.low_rank(adapter.adapted, base_layer, x, adapter.vectors.lambda_d, adapter.dropout)
    return laid_out_like(outputs, product)


def _check_part(adapter: ActiveAdapter, x: Tensor, base_output: Tensor) -> None:
    adapted = adapter.adapted
    if adapted.part is None:
        return
    adapted.part.check_sizes(x, base_output, adapted.name)
    if adapter.dropout.training and not isinstance(adapter.dropout, nn.Identity):
        raise ValueError(
            f"{adapted.name}: every process would drop other inputs of a weight that they divide; set dvora_dropout=0"
        )
