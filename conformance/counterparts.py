"""Translates LoRA's and VeRA's test cases to DVoRA: the class name, and the names of the same options."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig, VeraConfig

from dvora import DVoRAConfig

METHODS = (LoraConfig, VeraConfig)
_LORA_DEFAULTS = {"r": 8, "alpha": 8}
_OWN = {field.name for field in dataclasses.fields(DVoRAConfig)}
_RENAMED = {
    "lora_alpha": "alpha",
    "lora_dropout": "dvora_dropout",
    "init_lora_weights": "init_weights",
    "vera_dropout": "dvora_dropout",
    "projection_prng_key": "projection_seed",
}
_ALWAYS_SO = {"use_dora", "save_projection"}
"""What DVoRA does whatever is said, or needs not: its matrices are made from the seed."""
_LORA_ONLY = {
    "alora_invocation_tokens",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "velora_config",
}


class NoCounterpartError(ValueError):
    """The option is LoRA's alone."""


def options(of_other: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a LoRA or VeRA adapter, as DVoRA's.

    Raises:
        NoCounterpartError: one of them is LoRA's alone.
        KeyError: one of them is in no list here; PEFT has it since the lists were written.
    """
    own = {}
    for name, value in of_other.items():
        own_name = _RENAMED.get(name, name)
        # LoRA's named initialisations are its own factorisations of a weight.
        if own_name == "init_weights" and not isinstance(value, bool):
            raise NoCounterpartError(f"{name}={value!r}")
        if own_name in _OWN:
            own[own_name] = "dvora_only" if value in ("lora_only", "vera_only") else value
        elif name in _LORA_ONLY:
            raise NoCounterpartError(f"{name}={value!r}")
        elif name not in _ALWAYS_SO:
            raise KeyError(f"{name}={value!r}: say in {__file__} what DVoRA has in its place")
    return own


class InPlaceOfLora:
    """Called like `peft.LoraConfig`, makes a `DVoRAConfig`, with LoRA's rank and alpha where none are given."""

    def __new__(cls, **of_lora: Any) -> DVoRAConfig:  # type: ignore[misc]  # tests use it as a class
        return DVoRAConfig(**_LORA_DEFAULTS | options(of_lora))


def mentions(methods: tuple[type[PeftConfig], ...], value: object) -> bool:
    """Whether a test's parameter, or a part of it, is one of the config classes or made by one, subclasses apart."""
    if isinstance(value, list | tuple):
        return any(mentions(methods, item) for item in value)
    return (value if isinstance(value, type) else type(value)) in methods


def counterpart(value: Any) -> Any:
    """A parameter of a LoRA or VeRA case, or a row of them, as DVoRA's. LoRA's cases keep LoRA's rank and alpha.

    Raises:
        NoCounterpartError: the case has an option that is LoRA's alone.
    """
    if isinstance(value, tuple):
        defaults = _LORA_DEFAULTS if mentions((LoraConfig,), value) else {}
        return tuple(defaults | options(item) if isinstance(item, dict) else counterpart(item) for item in value)
    if isinstance(value, type):
        return DVoRAConfig if value in METHODS else value
    if isinstance(value, LoraConfig):
        return InPlaceOfLora(**_changed_options(value))
    if isinstance(value, str):
        return re.sub(r"LoRA with DoRA|LoRA|VeRA|DoRA", "DVoRA", re.sub(r"^(lora|vera)$", "dvora", value))
    return value


def _changed_options(config: PeftConfig) -> dict[str, Any]:
    default = type(config)()
    names = (field.name for field in dataclasses.fields(config) if field.init)
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    return {name: value for name, value in changed.items() if name != "peft_type"}
