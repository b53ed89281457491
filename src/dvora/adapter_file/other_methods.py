"""Adapters of LoRA, (IA)3 and RoAd as PEFT saves them, for serving beside adapters of DVoRA.

Taken is what computes just the method in linear layers; whatever changes the computation or the base is refused by the
setting's name. Their files do not say which base they belong to: only names and sizes of layers can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from peft import IA3Config, LoraConfig, PeftConfig, RoadConfig

from . import lora
from .content import Content, FactorSizes, SavedWhole, is_trained_whole
from .scales import ia3_sizes, road_sizes
from .settings import DVoRAConfig
from .values_file import Entries, plain_key


class Method(NamedTuple):
    """How a method's files are read."""

    factors: tuple[str, ...]
    """Of a layer, by the ends of their keys."""
    settings: Collection[str]
    """That change nothing else, whatever they are, beside those of all methods."""
    sizes: Callable[[Any, Any], list[FactorSizes]]
    """Of the layers, from shapes by layer and the configuration."""


METHODS: Mapping[type[PeftConfig], Method] = {
    LoraConfig: Method(lora.FACTORS, lora.SETTINGS, lora.lora_sizes),
    IA3Config: Method(("ia3_l",), ("feedforward_modules", "init_ia3_weights"), ia3_sizes),
    RoadConfig: Method(("road_theta", "road_alpha"), ("variant", "group_size", "init_weights"), road_sizes),
}
_SETTINGS = {
    *("target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "task_type", "peft_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
}


class Names(NamedTuple):
    """Keys of a file by what they are of."""

    factors: Mapping[str, tuple[str, ...]]
    """By the layer's name."""
    whole: Mapping[str, str]
    """By the name of the part of a head."""


def read_other(settings: bytes, config: Any, entries: Entries) -> tuple[DVoRAConfig, Content, Names]:
    """What an adapter of another method consists of: settings as of an adapter without layers of DVoRA, and its parts.

    Raises:
        TypeError, ValueError: it is of a method that does not share a base, computes something else than that method
            in linear layers, or its file is damaged.
    """
    if (method := METHODS.get(type(config))) is None:
        raise TypeError(
            f"it is an adapter of type {config.peft_type}; only those of DVoRA, LoRA, (IA)3 and RoAd share a base"
        )
    # PEFT drops those that it does not know.
    for setting, value in json.loads(settings).items():
        if value and setting not in _SETTINGS and setting not in method.settings:
            raise ValueError(f"{setting}={value!r:.80} is not served beside adapters of DVoRA; merge the adapter")
    modules = sorted(config.modules_to_save or ())
    common = DVoRAConfig(target_modules=[], modules_to_save=modules or None, task_type=config.task_type)
    common.auto_mapping, common.base_model_name_or_path = config.auto_mapping, config.base_model_name_or_path
    keys: dict[str, dict[str, str]] = {}
    whole = {}
    for key in entries:
        name = plain_key(key)
        if (factor := next((end for end in method.factors if name.endswith(f".{end}")), None)) is not None:
            keys.setdefault(name.removesuffix(f".{factor}"), {})[factor] = key
        elif is_trained_whole(key, common):
            whole[name] = key
        else:
            raise ValueError(f"{key} is of no linear layer and no head, and only these are served; merge the adapter")
    if not keys:
        raise ValueError(f"its file has no {' and '.join(method.factors)} of any layer; save the adapter again")
    for name, of_layer in keys.items():
        if missing := [factor for factor in method.factors if factor not in of_layer]:
            raise ValueError(f"{name} has no {missing[0]} in the file; save the adapter again")
    factors = {name: tuple(keys[name][factor] for factor in method.factors) for name in sorted(keys)}
    sizes = method.sizes({name: [entries[key][1] for key in factors[name]] for name in factors}, config)
    parts = tuple(SavedWhole(name, entries[whole[name]][1]) for name in sorted(whole))
    content = Content.of_saved(common, {})._replace(whole=parts, factors=tuple(sizes))
    return common, content, Names(factors, whole)
