"""Arithmetic on the adapters of a model: strength, interpolation, and weighted sums as one adapter, exactly or refused.

A sum of updates `W'_i - W` is one DVoRA update only if its low-rank parts share lambda_d up to a factor: with

    c = sum_i s_i (g_i - 1)        b = sum_i s_i g_i beta_i k_i        lambda_d_i = k_i lambda_d

it is `W' - W` of the adapter with `g = 1 + c`, `beta = b / g` and `m = g n`. Anything else has a higher rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .. import functional as F
from ..adapter_file.expressions import first_match
from ..adapter_file.settings import DVoRAConfig
from ..checks import checked_strength
from ..factors import factors_of
from ..functional import Vectors
from ..tensors import Float
from ..weight import AdaptedWeight
from .layer import DVoRALayer, check_unmerged, layers_of

INSTEAD = (
    "Activate them together instead, set_adapter([...]) with set_strength as their weights: outputs and merges are "
    "then the exact sum"
)
TOLERANCE = 1e-5
"""Relative distance below which two lambda_d are the same up to a factor."""
SMALLEST_GAIN = 1e-2
"""Float32 gains have an absolute precision of 6e-8, so rows with smaller gains would lose their direction."""


@torch.no_grad()
def set_strength(model: nn.Module, config: DVoRAConfig, adapter_name: str, strength: float | dict[str, float]) -> None:
    """Scale an adapter, and its configuration, in place: `DVoRAModel.set_strength`."""
    layers = layers_of(model, adapter_name)
    by_layer = strength if isinstance(strength, dict) else {".*": strength}
    for pattern, value in by_layer.items():
        checked_strength(value)
        if not any(get_pattern_key([pattern], layer.name) == pattern for layer in layers):
            raise ValueError(f"strength: no layer of adapter {adapter_name!r} is named {pattern!r}")
    check_unmerged(model, adapter_name)
    restore = strengths_as_they_are(layers, config, adapter_name)
    try:
        for layer in layers:
            key = layer.name if layer.name in by_layer else first_match(by_layer, layer.name)
            if key in by_layer:
                layer.set_strength(adapter_name, float(by_layer[key]))
        config.strength = _strengths(layers, adapter_name) if isinstance(strength, dict) else float(strength)
    except BaseException:
        restore()
        raise


def strengths_as_they_are(layers: Sequence[DVoRALayer], config: DVoRAConfig, adapter_name: str) -> Callable[[], None]:
    """A function that restores the present strengths of an adapter and of its configuration."""
    numbers, in_config = _strengths(layers, adapter_name), config.strength

    def restore() -> None:
        config.strength = in_config
        for layer in layers:
            layer.set_strength(adapter_name, numbers[layer.name])

    return restore


def _strengths(layers: Sequence[DVoRALayer], adapter_name: str) -> dict[str, float]:
    # A function of its own: from Python 3.12 on, what a trace raises in a comprehension misses the handlers around it.
    return {layer.name: layer.strength(adapter_name) for layer in layers}


def combined_config(model: nn.Module, configs: dict[str, DVoRAConfig], names: Sequence[str], new: str) -> DVoRAConfig:
    """The configuration of a new adapter that adapters of a model, of these configurations, are combined into.

    Raises:
        ValueError: a name is unknown or taken, or the adapters differ in more than their vectors.
    """
    unknown = [name for name in names if name not in configs]
    if unknown or not names:
        raise ValueError(f"adapters: {unknown or 'none'} given, the model has {sorted(configs)}")
    if new in configs:
        raise ValueError(f"adapter_name: there is an adapter {new!r} already; delete it first, or choose another name")
    first = configs[names[0]]
    layers = {layer.name for layer in layers_of(model, names[0])}
    for name in names:
        config = configs[name]
        if config.bias != "none" or config.modules_to_save or config.trainable_token_indices:
            raise ValueError(f"adapter {name!r} trains biases, tokens or whole modules too. {INSTEAD}")
        for setting in ("projection_seed", "projection_init"):
            if getattr(first, setting) != getattr(config, setting):
                raise ValueError(f"adapters {names[0]!r} and {name!r} have different {setting}. {INSTEAD}")
        if in_one := sorted(layers ^ {layer.name for layer in layers_of(model, name)}):
            raise ValueError(f"{in_one[0]} has one of the adapters {names[0]!r} and {name!r} only. {INSTEAD}")
    config = copy.deepcopy(first)
    config.strength, config.inference_mode = 1.0, False
    # The new adapter is made for this base, which may have been trained since the others were.
    config.base_probes = None
    config.forget_file()
    return config


def interpolated_vectors(model: nn.Module, a: str, b: str, t: float) -> dict[str, Vectors]:
    """Vectors between those of two adapters, exactly theirs at t = 0 and t = 1, by layer name.

    Raises:
        ValueError: t does not lie in 0 .. 1, or the adapters differ in rank, scale, direction or strength somewhere.
    """
    if isinstance(t, bool) or not isinstance(t, int | float) or not 0 <= t <= 1:
        raise ValueError(f"t must lie between 0 (the first adapter) and 1 (the second), got {t!r}")
    vectors = {}
    for layer in layers_of(model, a):
        for setting in ("rank", "scaling", "direction"):
            first, second = (getattr(layer.adapted(name), setting) for name in (a, b))
            if first != second:
                raise ValueError(f"{layer.name}: adapters {a!r} and {b!r} differ in {setting}: {first} and {second}")
        if layer.strength(a) != 1 or layer.strength(b) != 1:
            raise ValueError(f"{layer.name}: adapters {a!r} and {b!r} must have strength 1 to be interpolated")
        pairs = zip(layer.vectors(a), layer.vectors(b), strict=True)
        vectors[layer.name] = Vectors(*(torch.lerp(x, y, float(t)) for x, y in pairs))
    return vectors


def summed_vectors(model: nn.Module, names: Sequence[str], weights: Sequence[float]) -> dict[str, Vectors]:
    """Vectors of one adapter whose update is the weighted sum of others', by layer name.

    Raises:
        TypeError, ValueError: a weight is not a finite number, or no single adapter has that update.
    """
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} entries for {len(names)} adapters; pass one for each")
    shares = [checked_strength(weight) for weight in weights]
    try:
        return {layer.name: _weighted_sum(layer, names, shares) for layer in layers_of(model, names[0])}
    except ValueError as error:
        raise ValueError(f"{error}. {INSTEAD}") from None


@torch.no_grad()
def set_vectors(model: nn.Module, adapter_name: str, vectors: dict[str, Vectors]) -> None:
    """Copy vectors, by layer name, into an adapter."""
    for layer in layers_of(model, adapter_name):
        for vector, value in zip(layer.vectors(adapter_name), vectors[layer.name], strict=True):
            vector.copy_(value)


@torch.no_grad()
def _weighted_sum(layer: DVoRALayer, names: Sequence[str], weights: Sequence[float]) -> Vectors:
    """The vectors of the one adapter of a layer whose update is the sum of others', up to rounding.

    Raises:
        ValueError: no adapter has that update; the message says why.
    """
    into, weight = layer.adapted(names[0]), layer.unmerged() if layer.layer_type.has_weight else None
    if weight is not None:
        into.refresh_if_stale(weight)
    shares = [share * layer.strength(name) for share, name in zip(weights, names, strict=True)]
    vectors = [layer.vectors(name) for name in names]
    # Whether an adapter changes the direction of any row.
    turns = [bool(s != 0 and v.lambda_b.any() and v.lambda_d.any()) for s, v in zip(shares, vectors, strict=True)]
    directions = [v.lambda_d for v, turning in zip(vectors, turns, strict=True) if turning]
    lambda_d = max(directions, key=lambda d: float(d.norm())) if directions else into.initial_vectors(0.1).lambda_d
    if len(lambda_d) != into.rank:
        raise ValueError(f"{into.name}: an update of rank {len(lambda_d)} does not fit an adapter of rank {into.rank}")
    c, b = torch.zeros_like(into.w), torch.zeros_like(into.w)
    for name, share, of_one, turning in zip(names, shares, vectors, turns, strict=True):
        factors = factors_of(layer.adapted(name), of_one, weight)
        c = c + share * factors.gain_minus_one
        if turning:
            b = b + share * factors.scale * _factor(of_one.lambda_d, lambda_d, into.name)
    return _vectors_of(1 + c, b, lambda_d, weight, into)


def _factor(lambda_d: Float[Tensor, "R"], of: Float[Tensor, "R"], name: str) -> Tensor:
    if lambda_d.shape != of.shape:
        raise ValueError(f"{name}: updates of ranks {len(lambda_d)} and {len(of)} differ in scale")
    factor = (lambda_d @ of) / (of @ of)
    if (lambda_d - factor * of).norm() > TOLERANCE * lambda_d.norm():
        raise ValueError(
            f"{name}: the adapters have different lambda_d, so the sum of their updates has a higher rank than one "
            "adapter can have"
        )
    return factor


def _vectors_of(
    g: Float[Tensor, "O"],
    b: Float[Tensor, "O"],
    lambda_d: Float[Tensor, "R"],
    weight: Tensor | None,
    into: AdaptedWeight,
) -> Vectors:
    """The adapter with gain g whose update is b B diag(lambda_d) A."""
    w = into.w
    # kappa, and so beta / w, of a lambda_b of one.
    scale = F.relative_scale(torch.ones_like(w), w, into.scaling, into.direction)
    moved = (b != 0) & (w > 0)
    if (moved & ((g.abs() < SMALLEST_GAIN) | (scale == 0))).any():
        raise ValueError(f"{into.name}: some row of the sum has no gain that one adapter could express it with")
    kappa = torch.where(moved, b / torch.where(moved, g * w, 1.0), 0.0)
    lambda_b = torch.where(moved, kappa / torch.where(moved, scale, 1.0), 0.0)
    if into.direction == "weight" and into.rank:
        # A zero row of W has g = 1 and beta = c lambda_b.
        lambda_b = torch.where(w > 0, lambda_b, b / into.scaling)
    # Of a magnitude of w the gain is w / n.
    of_w = factors_of(into, Vectors(w, lambda_b, lambda_d), weight).gain
    assert of_w is not None
    return Vectors(g * w / of_w, lambda_b, lambda_d.clone())
