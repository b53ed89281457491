"""Checks of settings and adapter names by themselves, without a model."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..checks import rounds_to_zero

MAX_NAMES = 2**12
"""Entries of a list: PEFT compares each with every module of a model, and with every other."""
MAX_PROBES = 64
"""Numbers in the fingerprint of a layer; far more than this version writes."""
MAX_NAME = 200
"""Characters of an adapter's name, which is a folder's name where several adapters are saved."""
_HOLDERS = nn.ModuleDict(), nn.ParameterDict()
_OWN_NAMES = {"weight", "bias", "base_layer"}


def check_adapter_name(name: object, taken: Collection[str] = ()) -> None:
    """Refuse a name under which torch or PEFT could not store an adapter, or not find its values again.

    Args:
        name: of the adapter.
        taken: names of the model's own parameters and buffers, without their modules': PEFT cuts an adapter's name off
            the end of all of them.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty or too long, part of a path, or has a meaning of its own.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {name!r:.100} of type {type(name).__name__}")
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ValueError(f"adapter_name must have 1 to {MAX_NAME} characters, all printable, got {name!r:.300}")
    if "." in name or "\\" in name or name.startswith("/"):
        raise ValueError(
            f"adapter_name {name!r} has a dot or is a path; parameters and folders are named by it, so use another"
        )
    if name in _OWN_NAMES or name in taken or any(hasattr(holder, name) for holder in _HOLDERS):
        raise ValueError(f"adapter_name {name!r} has a meaning of its own in a torch or PEFT model; use another")


def check_types(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the wrong type; those that are numbers or choices are checked by their values.

    Raises:
        TypeError: a setting is of the wrong type.
        ValueError: `modules_to_save` holds an empty name.
    """
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(settings[name], str | os.PathLike | None):
            raise TypeError(f"{name} must be a string or None, got {settings[name]!r}")
    for name in ("target_modules", "magnitude_modules", "exclude_modules", "layers_pattern"):
        value = settings[name]
        if not (value is None or isinstance(value, str) or all_of(value, str)):
            raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    for name in ("modules_to_save", "target_parameters"):
        value = settings[name]
        if not (value is None or all_of(value, str)):
            raise TypeError(f"{name} must be a list of names, got {value!r}")
    for name in ("target_modules", "magnitude_modules", "exclude_modules", "target_parameters", "layers_to_transform"):
        if isinstance(settings[name], list | tuple | set) and len(settings[name]) > MAX_NAMES:
            raise ValueError(f"{name} has {len(settings[name])} entries, expected at most {MAX_NAMES}")
    if "" in (settings["modules_to_save"] or ()):
        # PEFT compares ends of names, so this one is every module's, the model's own included.
        raise ValueError(f"modules_to_save must not hold an empty name, got {settings['modules_to_save']!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        value = settings[name]
        if not (isinstance(value, dict) and all_of(set(value), str)):
            raise TypeError(f"{name} must be a dictionary from layer names to numbers, got {value!r}")
    layers = settings["layers_to_transform"]
    if not (layers is None or all_of(layers if isinstance(layers, list) else [layers], int)):
        raise TypeError(f"layers_to_transform must be an index or a list of indices, got {layers!r}")
    strength = settings["strength"]
    if isinstance(strength, dict) and not all_of(set(strength), str):
        raise TypeError(f"strength must be a number, or a dictionary from layer names, got {strength!r}")
    tokens = settings["trainable_token_indices"]
    by_layer = tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]
    if not all(all_of(indices, int) for indices in by_layer):
        raise TypeError(f"trainable_token_indices must be lists of indices, got {tokens!r}")
    probes = settings["base_probes"]
    if probes is not None and not (isinstance(probes, dict) and all(all_of(p, float, int) for p in probes.values())):
        raise TypeError(f"base_probes must be a dictionary from layer names to lists of numbers, got {probes!r:.500}")
    for layer, values in (probes or {}).items():
        if len(values) > MAX_PROBES:
            raise ValueError(f"base_probes of {layer!r:.100} has {len(values)} numbers, expected {MAX_PROBES} at most")


def check_training(settings: Mapping[str, Any]) -> None:
    """Refuse settings with which a vector that is to be trained would never change.

    Raises:
        ValueError: its gradient is zero and stays so.
    """
    train, ranks = settings["train"], (settings["r"], *settings["rank_pattern"].values())
    rows = {"lambda_b", "lambda_d"}.intersection(train)
    if settings["init_weights"] and rows == {"lambda_d"}:
        raise ValueError(
            f"train={train!r} would never move lambda_d: its gradient is zero while lambda_b is, which starts there "
            "and would stay; train lambda_b too, or leave lambda_d out"
        )
    if settings["init_weights"] and rows and rounds_to_zero(settings["d_initial"]):
        raise ValueError(
            f"d_initial={settings['d_initial']} would never move lambda_b and lambda_d, which are both zero then: "
            "start with another value, or train the magnitude only"
        )
    for name, alphas in (("alpha", [settings["alpha"]]), ("alpha_pattern", settings["alpha_pattern"].values())):
        if rows and any(alpha is not None and rounds_to_zero(alpha / max(ranks)) for alpha in alphas):
            raise ValueError(f"{name}={settings[name]!r} gives a scale alpha / r of zero in float32: it trains nothing")
    strength = settings["strength"]
    if any(map(rounds_to_zero, strength.values() if isinstance(strength, dict) else [strength])):
        raise ValueError(
            f"strength={strength!r} trains nothing where it is zero; leave such layers out with exclude_modules, or "
            "call set_strength once the adapter is trained"
        )


def all_of(values: object, *types: type) -> bool:
    """Whether it is a collection of values of these very types."""
    return isinstance(values, list | tuple | set) and all(type(value) in types for value in values)
