"""The row factors of all layers of an adapter at once, from any number of flat vectors.

Dimensions: N vectors, L layers of one shape, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...factors import StackConstants, stacked_factors
from ...functional import Vectors
from ...tensors import Float, is_dtensor, weight_in_memory
from ...weight import AdaptedWeight
from ..layer import DVoRALayer


class LayerFactors(NamedTuple):
    """All that tokens need of an adapter in one layer; N is absent for a single vector."""

    gain_minus_one: Float[Tensor, "*N O"]
    """`g - 1`, of the base's output."""
    scale: Float[Tensor, "*N O"]
    """`g beta`, of the low-rank product."""
    lambda_d: Float[Tensor, "*N R"]
    """Of the projected inputs; empty for a layer that has the magnitude only."""


@torch.no_grad()
def factors_of_layers(
    layers: Mapping[str, DVoRALayer], adapter_name: str, vectors: Mapping[str, Vectors]
) -> dict[str, LayerFactors]:
    """The factors of N vectors, by layer: one batched computation for each shape of layers.

    Args:
        layers: of the adapter, by name.
        adapter_name: whose frozen side and strength are used.
        vectors: each (N, O) or (N, R), by name; lambda_b and lambda_d are (N, 0) where there is the magnitude only.
    """
    stacks: dict[object, list[str]] = {}
    for name, layer in layers.items():
        stacks.setdefault(layer.adapted(adapter_name).stack_key, []).append(name)
    found: dict[str, LayerFactors] = {}
    for names in stacks.values():
        of_stack = _stack_factors([layers[name] for name in names], adapter_name, [vectors[name] for name in names])
        found |= zip(names, of_stack, strict=True)
    return {name: found[name] for name in layers}


def _stack_factors(layers: Sequence[DVoRALayer], adapter_name: str, vectors: Sequence[Vectors]) -> list[LayerFactors]:
    """The factors of layers of one shape, as parts of one tensor."""
    stacked = Vectors(*(torch.stack(of_kind) for of_kind in zip(*map(with_zeros, vectors), strict=True)))
    constants = StackConstants.of([_adapted(layer, adapter_name) for layer in layers])
    stacked = stacked.to(constants.w.dtype)
    gain_minus_one, scale, _ = stacked_factors(stacked, constants)
    strengths = torch.stack([layer.strength(adapter_name) for layer in layers])[:, None, None]
    return list(map(LayerFactors, gain_minus_one * strengths, scale * strengths, stacked.lambda_d))


def with_zeros(vectors: Vectors) -> Vectors:
    """The vectors with zeros for a lambda_b that the layer does not have."""
    magnitude, lambda_b, lambda_d = vectors
    return vectors if lambda_b.shape == magnitude.shape else Vectors(magnitude, torch.zeros_like(magnitude), lambda_d)


def _adapted(layer: DVoRALayer, adapter_name: str) -> AdaptedWeight:
    """The frozen side of an adapter, with the constants of the weight as it is now."""
    weight = weight_in_memory(layer.get_base_layer(), layer.parameter_name) if layer.layer_type.has_weight else None
    if is_dtensor(weight):
        raise ValueError(
            f"model: the weight of {layer.name} is sharded over processes, and factors are of whole rows; make them "
            "of the model in one process, or let each layer make its own as it runs"
        )
    adapted = layer.adapted(adapter_name)
    if weight is not None:
        adapted.refresh_if_stale(weight)
    return adapted
