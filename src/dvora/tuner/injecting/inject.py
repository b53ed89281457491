"""Gives a weight an adapter as its configuration describes it: measured first, then put into the layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ...engines.tensor_parallel import is_divided
from ...matrices import philox
from ...matrices.interface import SharedProjections, checked_distribution
from ...method.functional import Vectors, row_norm
from ...method.validation import check_bias, checked_direction, checked_norm_cache
from ...weight.adapted_weight import MAGNITUDE_ONLY, AdaptedWeight
from ...weight.layouts import is_at_hand
from ..config import DVoRAConfig
from ..layers.base_fingerprint import probes_of
from ..layers.base_layer import Probed, bias_of
from ..layers.layer import DVoRALayer
from ..layers.layer_types import skipped_column
from .targets import Target, matches

_RANDOM_START_STREAM = 2**32


class Measured(NamedTuple):
    """What is known of a target before the model is touched."""

    adapted: AdaptedWeight
    probes: list[float]


def measure(target: Target, config: DVoRAConfig, shared: SharedProjections) -> Measured:
    """Read a base weight once, for the norm constants and the probes.

    Raises:
        TypeError, ValueError: the weight cannot be adapted.
    """
    weight = target.weight()
    if target.kind.low_rank is not None:
        check_bias(bias_of(target.base(), None), target.name)
    magnitude_only = matches(config.magnitude_modules, target.module_name)
    adapted = AdaptedWeight(
        weight,
        MAGNITUDE_ONLY if magnitude_only else config.rank_of(target.name),
        shared=shared,
        alpha=None if magnitude_only else config.alpha_of(target.name),
        direction=checked_direction(config.direction),
        detach_norm=config.detach_norm,
        layout=target.kind.layout,
        skipped_column=skipped_column(target.base()),
        readable=target.is_readable(),
        norm_cache=checked_norm_cache(config.norm_cache),
        name=target.name,
    )
    return Measured(adapted, probes_of(target.kind.layout.matrix(weight), adapted.w))


def add_adapter(
    layer: DVoRALayer, adapter_name: str, config: DVoRAConfig, measured: Measured, active_adapters: Sequence[str]
) -> None:
    """Add an adapter with its starting values to a layer.

    Args:
        layer: the wrapped weight.
        adapter_name: of the adapter.
        config: of the adapter.
        measured: of the weight.
        active_adapters: of the model.
    """
    vectors = measured.adapted.initial_vectors(config.d_initial)
    if not config.init_weights:
        others = len(set(layer.dvora_adapted) - {adapter_name})
        vectors = _random_vectors(vectors, config.projection_seed, f"{others}/{layer.name}")
    layer.update_layer(
        adapter_name,
        measured.adapted,
        vectors,
        trained=config.train,
        strength=config.strength_of(layer.name),
        dropout=config.dvora_dropout,
        inference_mode=config.inference_mode,
    )
    layer.probes = measured.probes
    layer.probed = Probed(layer.stored())
    layer.set_adapter(list(active_adapters), inference_mode=config.inference_mode)
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def present_probes(layer: DVoRALayer) -> list[float]:
    """The probes of a layer's base weight as it is now, which may have been trained since it was adapted.

    Of one that processes divide they are those from when it was adapted.
    """
    stored = layer.stored()
    if stored is None or not is_at_hand(stored) or is_divided(stored):
        return layer.probes
    if not layer.probed.is_of(stored):
        # Noted first: what is written meanwhile is seen the next time.
        layer.probed = Probed(stored)
        matrix = layer.kind.layout.matrix(layer.unmerged())
        layer.probes = probes_of(matrix, row_norm(matrix))
    return layer.probes


def projections_of(model: nn.Module, config: DVoRAConfig) -> SharedProjections:
    """The model's projections of this seed and distribution, or new ones."""
    for module in model.modules():
        if (
            isinstance(module, SharedProjections)
            and module.seed == config.projection_seed
            and module.distribution == config.projection_init
        ):
            return module
    return SharedProjections(config.projection_seed, checked_distribution(config.projection_init))


def _random_vectors(start: Vectors, seed: int, key: str) -> Vectors:
    """Vectors that are not the identity, a pure function of the seed, the layer's name and its number of adapters."""
    stream = _RANDOM_START_STREAM + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    magnitude, lambda_b, lambda_d = (
        torch.from_numpy(philox.uniform_row(seed, stream, row, len(vector))).to(vector)
        for row, vector in enumerate(start)
    )
    return Vectors(start.magnitude * (1 + 0.1 * magnitude), lambda_b, 1 + lambda_d)
