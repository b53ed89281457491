"""What a configuration's settings may be, before anything is made of them: their types, and their expressions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


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
        raise TypeError(f"base_probes must be a dictionary from layer names to lists of numbers, got {probes!r}")


def check_expressions(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are read as regular expressions and are none.

    Raises:
        ValueError: one cannot be compiled.
    """
    for name, expression in _expressions(settings):
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{name}: {expression!r} is not a regular expression: {error}") from error


def all_of(values: object, *types: type) -> bool:
    """Whether it is a collection of values of these very types."""
    return isinstance(values, list | tuple | set) and all(type(value) in types for value in values)


def _expressions(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("target_modules", "magnitude_modules", "exclude_modules"):
        if isinstance(settings[name], str):
            yield name, settings[name]
    patterns, strength = settings["layers_pattern"], settings["strength"]
    several: dict[str, Iterable[str]] = {
        "layers_pattern": [patterns] if isinstance(patterns, str) else patterns or (),
        "modules_to_save": settings["modules_to_save"] or (),
        "rank_pattern": settings["rank_pattern"],
        "alpha_pattern": settings["alpha_pattern"],
        "strength": strength if isinstance(strength, dict) else (),
    }
    yield from ((name, expression) for name, expressions in several.items() for expression in expressions)
