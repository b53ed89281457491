"""Checks that run before a model is touched: targets, layers, the base model, the values of a file.

PEFT replaces layers one by one, so an error half-way would leave a model half adapted.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ..adapted_weight import check_norms, check_weight
from ..functional import row_norm
from ..generator import uniform_row
from ..merging import check_can_be_set
from .config import DVoRAConfig
from .kinds import KINDS, kind_of, weight_of
from .layer import DVoRALayer

BASE_TOLERANCE = 0.3
"""Largest distance of the probes of a weight to those of the weight that an adapter was trained on.

The probes of an unrelated weight lie about 1.4 away. Casts to half precision move them by 0.002, eight bits by
0.006, four bits by 0.1."""
NORM_TOLERANCE = 0.05
"""Largest relative difference of the weights' norms."""

_PROBES, _PROBE_SEED, _ROW_STREAM, _COLUMN_STREAM = 8, 0, 2**33, 2**33 + 1


def check_targets(targets: Mapping[str, nn.Module], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse target names that match nothing, with the closest names that exist.

    Args:
        targets: the matched layers, by name.
        config: whose `target_modules` are still as the user gave them.
        model: the model to adapt.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) some name, or everything, matched nothing.
    """
    names = config.target_modules
    if isinstance(names, set | list):
        unmatched = sorted(set(names) - names_found(names, model))
    else:
        unmatched = [] if targets or names is None else [names]
    if unmatched:
        raise NoMatchingPeftModuleError(
            "target_modules: nothing in the model is named "
            + "; ".join(f"{name!r}{_closest(name, model)}" for name in unmatched)
        )
    if not targets:
        raise NoMatchingPeftModuleError(
            f"no layer is left to adapt: target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and modules_to_save="
            f"{config.modules_to_save!r} match none of the model's layers"
        )


def names_found(names: Iterable[str], model: nn.Module) -> set[str]:
    """Those of the target names that some module has."""
    paths = [name.split(".") for name, _ in model.named_modules()]
    endings = {".".join(path[start:]) for path in paths for start in range(len(path))}
    return endings.intersection(names)


def check_layers(targets: Mapping[str, nn.Module], config: DVoRAConfig) -> dict[str, list[float]]:
    """Refuse layers that cannot be adapted, and a base model that the adapter was not made for.

    Returns:
        Probes of every target's base weight, by layer name: what `DVoRAConfig.base_probes` keeps.

    Raises:
        TypeError: a layer's type or dtype is not supported, or it carries an adapter of another method.
        ValueError: a weight is on the meta device, not finite, or not the one the adapter was made for.
    """
    probes = {}
    for name, layer in targets.items():
        probes[name] = _probes(_matrix(layer, name), name)
        if config.fan_in_fan_out and isinstance(layer, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True is ignored: {name} is a torch.nn.Linear, whose weight is (out, in)", stacklevel=4
            )
    for name, expected in (config.base_probes or {}).items():
        if name in probes and not _alike(probes[name], expected):
            raise ValueError(
                f"{name}: the adapter was made for another base model: norm and random projections of the layer's "
                f"weight are {probes[name]} here and were {expected} there, too far for a cast or a quantisation. To "
                "use it all the same, set base_probes=None in its configuration"
            )
    return probes


def check_mergeable(model: nn.Module, adapter_names: list[str]) -> None:
    """Refuse a merge that cannot be done whole, before any layer is merged.

    Raises:
        TypeError: a layer computes its weight in every pass.
        ValueError: a vector is not finite or a magnitude exceeds the weight's dtype, or a layer's weight belongs to
            another module too, such as an embedding tied to the head.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for layer in model.modules():
        if isinstance(layer, DVoRALayer):
            check_can_be_set(layer.base_layer, layer.name)
            weight = weight_of(layer.base_layer)
            if len(names := owners.get(id(weight), [])) > 1:
                raise ValueError(
                    f"{layer.name}: its weight is tied ({' and '.join(names)} are one tensor), so merging would change "
                    "the other layer too; untie the weights in the base model first, or keep the adapter unmerged"
                )
            for name in (n for n in adapter_names if n in layer.dvora_adapted):
                _check_range(layer, name, weight.dtype)


def _check_range(layer: DVoRALayer, adapter_name: str, dtype: torch.dtype) -> None:
    vectors = layer.vectors(adapter_name)
    # The magnitude is the norm of a merged row, so it bounds every merged value.
    fits = vectors.magnitude.abs().max() <= torch.finfo(dtype).max
    if not (fits and all(vector.isfinite().all() for vector in vectors)):
        raise ValueError(
            f"{layer.name}: adapter {adapter_name!r} has values that are not finite or too large for {dtype}; nothing "
            "was merged. Its training diverged: go back to an earlier checkpoint"
        )


def checked_vectors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a loaded state dict, vectors checked and in the layers' own dtype.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        state_dict: keys as in the model's own state dict.

    Raises:
        ValueError: a vector is missing, unknown, of another shape, not floating or not finite.
    """
    own = {
        f"{name}.{vector}.{adapter_name}": getattr(layer, vector)[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, DVoRALayer) and adapter_name in layer.dvora_adapted
        for vector in DVoRALayer.adapter_layer_names
    }
    vector_key = re.compile(r"\.(" + "|".join(DVoRALayer.adapter_layer_names) + r")(\.|$)")
    unknown = [key for key in state_dict if vector_key.search(key) and key not in own]
    if unknown:
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(unknown)}")
    missing = [key for key in own if key not in state_dict]
    if missing:
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")
    return {k: _checked_vector(k, v, own[k]) if k in own else v for k, v in state_dict.items()}


def _checked_vector(key: str, loaded: Tensor, own: Tensor) -> Tensor:
    if loaded.shape != own.shape:
        raise ValueError(
            f"{key} has shape {tuple(loaded.shape)} in the adapter and {tuple(own.shape)} in the model: another base "
            "model, or another rank than the configuration says; neither can be changed by loading"
        )
    if not loaded.is_floating_point():
        raise ValueError(f"{key} has dtype {loaded.dtype} in the adapter, expected a floating-point vector")
    if not loaded.isfinite().all():
        raise ValueError(
            f"{key} has values that are not finite in the adapter; the file is damaged or training diverged"
        )
    return loaded.to(own.dtype)


def _matrix(layer: nn.Module, name: str) -> Tensor:
    if isinstance(layer, DVoRALayer):
        return layer.unmerged_matrix()
    if isinstance(layer, BaseTunerLayer):
        raise TypeError(
            f"{name} already carries an adapter of another method ({type(layer).__module__.split('.')[-2]}); merge or "
            "unload it first, or leave the layer out with exclude_modules"
        )
    kind = kind_of(layer, name)
    weight = weight_of(layer)
    check_weight(weight, name)
    return kind.matrix(weight)


@torch.no_grad()
def _probes(matrix: Tensor, name: str) -> list[float]:
    """The norm of W, and products `u^T W v` with random vectors: of the norm's size, and other for another W."""
    norms = row_norm(matrix)
    check_norms(norms, name)
    u, v = (
        torch.from_numpy(np.stack([uniform_row(_PROBE_SEED, stream, k, size) for k in range(_PROBES)])).to(norms)
        for stream, size in zip((_ROW_STREAM, _COLUMN_STREAM), matrix.shape, strict=True)
    )
    products = 3 * ((u @ matrix.to(u.dtype)) * v).sum(1)
    return [float(f"{value:.4g}") for value in (float(norms.norm()), *products.tolist())]


def _alike(probes: list[float], expected: list[float]) -> bool:
    if len(probes) != len(expected):
        return False
    (norm, *products), (expected_norm, *expected_products) = probes, expected
    distance = math.dist(products, expected_products) / math.sqrt(_PROBES)
    return abs(norm - expected_norm) <= NORM_TOLERANCE * expected_norm and distance <= BASE_TOLERANCE * expected_norm


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, but those inside an adapter that is already there."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")


def _closest(name: str, model: nn.Module) -> str:
    layers = sorted({n.rpartition(".")[2] for n, m in outside_adapters(model) if isinstance(m, (*KINDS, DVoRALayer))})
    close = difflib.get_close_matches(name.rpartition(".")[2], layers, n=3)
    if close:
        return f" (closest: {', '.join(close)})"
    return f" (layers that can be adapted: {', '.join(layers[:10]) or 'none'})"


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
