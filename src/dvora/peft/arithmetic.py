"""Arithmetic on the adapters of a model: strength, interpolation, weighted sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from ..checks import checked_strength
from ..functional import Vectors
from .config import DVoRAConfig
from .layers.layer import DVoRALayer, check_unmerged, layers_of
from .layers.vectors import strength_key
from .restoring import on_failure
from .weighted_sum import WeightedAdapter, interpolated, weighted_sum

INSTEAD = (
    "Activate them together instead, set_adapter([...]) with set_strength as their weights: outputs and merges are "
    "then the exact sum"
)


@torch.no_grad()
def set_strength(model: nn.Module, config: DVoRAConfig, adapter_name: str, strength: float | dict[str, float]) -> None:
    """Scale an adapter in place: s of `W + s (W' - W)`.

    Args:
        model: with the adapter.
        config: the model's own, which keeps the strength.
        adapter_name: of the adapter.
        strength: a number, or numbers by layer name or regular expression; layers that it does not name keep theirs.

    Raises:
        TypeError, ValueError: a strength is not a finite number, a name matches no layer, or the adapter is merged.
    """
    layers = layers_of(model, adapter_name)
    by_layer = strength if isinstance(strength, dict) else {".*": strength}
    for pattern, value in by_layer.items():
        checked_strength(value)
        if not any(get_pattern_key([pattern], layer.name) == pattern for layer in layers):
            raise ValueError(f"strength: no layer of adapter {adapter_name!r} is named {pattern!r}")
    check_unmerged(model, adapter_name)
    with on_failure(strengths_as_they_are(layers, config, adapter_name)):
        for layer in layers:
            key = strength_key(by_layer, layer.name)
            if key in by_layer:
                layer.set_strength(adapter_name, float(by_layer[key]))
        by_name = {layer.name: float(layer.strength(adapter_name)) for layer in layers}
        config.strength = by_name if isinstance(strength, dict) else float(strength)


def strengths_as_they_are(layers: Sequence[DVoRALayer], config: DVoRAConfig, adapter_name: str) -> Callable[[], None]:
    """A function that restores the present strengths of an adapter and of its configuration."""
    numbers, in_config = [float(layer.strength(adapter_name)) for layer in layers], config.strength

    def put_back() -> None:
        config.strength = in_config
        for layer, number in zip(layers, numbers, strict=True):
            layer.set_strength(adapter_name, number)

    return put_back


def combined_config(model: nn.Module, configs: dict[str, DVoRAConfig], names: Sequence[str], new: str) -> DVoRAConfig:
    """The configuration of an adapter that other adapters are combined into.

    Args:
        model: with the adapters.
        configs: of all its adapters.
        names: of those to combine.
        new: name of the combination.

    Raises:
        ValueError: a name is unknown or taken, or the adapters differ in more than their vectors.
    """
    unknown = [name for name in names if name not in configs]
    if unknown or not names:
        raise ValueError(f"adapters: {unknown or 'none'} given, the model has {sorted(configs)}")
    if new in configs:
        raise ValueError(f"adapter_name: there is an adapter {new!r} already; delete it first, or choose another name")
    first, *others = (configs[name] for name in names)
    for name in names:
        if configs[name].bias != "none" or configs[name].modules_to_save or configs[name].trainable_token_indices:
            raise ValueError(f"adapter {name!r} trains biases, tokens or whole modules too. {INSTEAD}")
    for other, name in zip(others, names[1:], strict=True):
        for setting in ("projection_seed", "projection_init"):
            if getattr(first, setting) != getattr(other, setting):
                raise ValueError(f"adapters {names[0]!r} and {name!r} have different {setting}. {INSTEAD}")
        here, there = ({layer.name for layer in layers_of(model, n)} for n in (names[0], name))
        if here != there:
            raise ValueError(
                f"{sorted(here ^ there)[0]} has one of the adapters {names[0]!r} and {name!r} only. {INSTEAD}"
            )
    config = copy.deepcopy(first)
    config.strength, config.inference_mode = 1.0, False
    # The new adapter is made for this base, which may have been trained since the others were.
    config.base_probes = None
    config.forget_file()
    return config


def interpolated_vectors(model: nn.Module, a: str, b: str, t: float) -> dict[str, Vectors]:
    """Vectors between those of two adapters, by layer name.

    Raises:
        ValueError: t does not lie in 0 .. 1, or the adapters differ in rank, scale, direction or strength somewhere.
    """
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ValueError(f"t must lie between 0 (the first adapter) and 1 (the second), got {t!r}")
    for layer in layers_of(model, a):
        for setting in ("rank", "scaling", "direction"):
            first, second = (getattr(layer.adapted(name), setting) for name in (a, b))
            if first != second:
                raise ValueError(f"{layer.name}: adapters {a!r} and {b!r} differ in {setting}: {first} and {second}")
        if layer.strength(a) != 1 or layer.strength(b) != 1:
            raise ValueError(f"{layer.name}: adapters {a!r} and {b!r} must have strength 1 to be interpolated")
    return {layer.name: interpolated(layer.vectors(a), layer.vectors(b), float(t)) for layer in layers_of(model, a)}


def summed_vectors(model: nn.Module, names: Sequence[str], weights: Sequence[float]) -> dict[str, Vectors]:
    """Vectors of one adapter whose update is the weighted sum of others', by layer name.

    Raises:
        TypeError, ValueError: a weight is not a finite number, or no single adapter has that update.
    """
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} entries for {len(names)} adapters; pass one for each")
    shares = [checked_strength(weight) for weight in weights]
    try:
        return {layer.name: _summed(layer, names, shares) for layer in layers_of(model, names[0])}
    except ValueError as error:
        raise ValueError(f"{error}. {INSTEAD}") from None


@torch.no_grad()
def set_vectors(model: nn.Module, adapter_name: str, vectors: dict[str, Vectors]) -> None:
    """Copy vectors, by layer name, into an adapter."""
    for layer in layers_of(model, adapter_name):
        for own, value in zip(layer.vectors(adapter_name), vectors[layer.name], strict=True):
            own.copy_(value)


def _summed(layer: DVoRALayer, names: Sequence[str], shares: Sequence[float]) -> Vectors:
    parts = [
        WeightedAdapter(share * layer.strength(name), layer.vectors(name), layer.adapted(name))
        for name, share in zip(names, shares, strict=True)
    ]
    weight = layer.unmerged() if layer.layer_type.has_weight else None
    return weighted_sum(parts, weight, layer.adapted(names[0]))
