"""Gives a weight an adapter as its configuration describes it: prepared first, then put into the layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...checks import check_bias, checked_direction
from ...functional import Vectors
from ...matrices import philox
from ...matrices.interface import SharedProjections
from ...tensors import bias_of
from ...weight import MAGNITUDE_ONLY, AdaptedWeight
from ..config import DVoRAConfig
from ..layers.base_fingerprint import fingerprint_of
from ..layers.base_layer import Fingerprinted
from ..layers.layer import DVoRALayer
from ..layers.layer_types import padding_column
from ..layers.low_rank import convolve
from .targets import Target, matches

_RANDOM_START_STREAM = 2**32


class PreparedTarget(NamedTuple):
    """What is known of a target before the model is changed."""

    adapted: AdaptedWeight
    fingerprint: list[float]


def rank_of(target: Target, config: DVoRAConfig) -> int:
    """The rank that a target gets; `MAGNITUDE_ONLY` where the configuration says so."""
    return MAGNITUDE_ONLY if matches(config.magnitude_modules, target.module_name) else config.rank_of(target.name)


def prepare(target: Target, config: DVoRAConfig, shared: SharedProjections) -> PreparedTarget:
    """Read a base weight once, for the norm constants and the fingerprint.

    Raises:
        TypeError, ValueError: the weight cannot be adapted.
    """
    weight = target.weight()
    if target.layer_type.low_rank is not None:
        check_bias(bias_of(target.base(), None), target.name)
    rank = rank_of(target, config)
    adapted = AdaptedWeight(
        weight,
        rank,
        shared=shared,
        alpha=None if rank == MAGNITUDE_ONLY else config.alpha_of(target.name),
        direction=checked_direction(config.direction),
        detach_norm=config.detach_norm,
        layout=target.layer_type.layout,
        padding_column=padding_column(target.base()),
        readable=target.is_readable(),
        reads_matrices=target.layer_type.low_rank in (None, convolve),
        name=target.name,
    )
    return PreparedTarget(adapted, fingerprint_of(target.layer_type.layout.matrix(weight), adapted.w))


def add_adapter(
    layer: DVoRALayer, adapter_name: str, config: DVoRAConfig, prepared: PreparedTarget, active_adapters: Sequence[str]
) -> None:
    """Add an adapter with its starting values to a layer.

    Args:
        layer: the wrapped weight.
        adapter_name: of the adapter.
        config: of the adapter.
        prepared: what is known of the weight.
        active_adapters: of the model.
    """
    vectors = prepared.adapted.initial_vectors(config.d_initial)
    if not config.init_weights:
        others = len(set(layer.dvora_adapted) - {adapter_name})
        vectors = _random_vectors(vectors, config.projection_seed, f"{others}/{layer.name}")
    layer.update_layer(
        adapter_name,
        prepared.adapted,
        vectors,
        trained=config.train,
        strength=config.strength_of(layer.name),
        dropout=config.dvora_dropout,
        inference_mode=config.inference_mode,
    )
    layer.fingerprint = prepared.fingerprint
    layer.fingerprinted = Fingerprinted(layer.stored())
    layer.set_adapter(list(active_adapters), inference_mode=config.inference_mode)
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def _random_vectors(start: Vectors, seed: int, key: str) -> Vectors:
    """Vectors that are not the identity, a pure function of the seed, the layer's name and its number of adapters."""
    stream = _RANDOM_START_STREAM + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    magnitude, lambda_b, lambda_d = (
        torch.from_numpy(philox.uniform_row(seed, stream, row, len(vector))).to(vector)
        for row, vector in enumerate(start)
    )
    return Vectors(start.magnitude * (1 + 0.1 * magnitude), lambda_b, 1 + lambda_d)
