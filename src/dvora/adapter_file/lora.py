"""A LoRA adapter as PEFT saves it, for serving beside adapters of DVoRA: `y + scaling B (A x)` in linear layers.

Taken is what computes just that; whatever changes the computation or the base is refused by the setting's name. Files
of LoRA do not say which base they belong to: only names and sizes of layers can be compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from peft import LoraConfig

from .content import Content, LoRASizes, SavedWhole, is_trained_whole
from .patterns import check_expressions, value_of
from .settings import DVoRAConfig
from .values_file import Entries, plain_key

_NEUTRAL = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights", "eva_config", "qalora_group_size", "megatron_core", "runtime_config",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
"""Settings with which an adapter computes nothing else, whatever they are."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it was."""
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")


class LoRANames(NamedTuple):
    """Keys of a file by what they are of."""

    factors: Mapping[str, tuple[str, str]]
    """Those of A and B by the layer's name."""
    whole: Mapping[str, str]
    """By the name of the part of a head."""


def lora_of(config: LoraConfig, entries: Entries) -> tuple[DVoRAConfig, Content, LoRANames]:
    """What a LoRA adapter consists of: its settings as those of an adapter without layers of DVoRA, and its parts.

    Raises:
        ValueError: it computes something else than LoRA of linear layers, or its file is damaged.
    """
    _check_plain(config)
    modules = sorted(config.modules_to_save or ())
    settings = DVoRAConfig(target_modules=[], modules_to_save=modules or None, task_type=config.task_type)
    settings.auto_mapping, settings.base_model_name_or_path = config.auto_mapping, config.base_model_name_or_path
    keys: dict[str, dict[str, str]] = {}
    whole = {}
    for key in entries:
        name = plain_key(key)
        if match := _FACTOR.fullmatch(name):
            keys.setdefault(match[1], {})[match[2]] = key
        elif is_trained_whole(key, settings):
            whole[name] = key
        else:
            raise ValueError(f"{key} is of no linear layer and no head, and only these are served of LoRA; merge it")
    check_expressions({"alpha_pattern": config.alpha_pattern, "rank_pattern": config.rank_pattern}, keys)
    factors = {name: (keys[name].get("A", ""), keys[name].get("B", "")) for name in sorted(keys)}
    layers = tuple(_sizes(name, *factors[name], entries, config) for name in factors)
    if not layers:
        raise ValueError("its file has no lora_A and lora_B of any layer; save the adapter again")
    parts = tuple(SavedWhole(name, entries[whole[name]][1]) for name in sorted(whole))
    content = Content.of_saved(settings, {})._replace(whole=parts, lora=layers)
    return settings, content, LoRANames(factors, whole)


def _check_plain(config: LoraConfig) -> None:
    for setting, value in vars(config).items():
        if setting == "bias" and value == "none":
            continue
        if setting == "init_lora_weights" and value not in _PLAIN_STARTS:
            raise ValueError(
                f"init_lora_weights={value!r:.40} changes the base itself; convert the adapter to a plain one "
                "(path_initial_model_for_weight_conversion of PEFT's save_pretrained), or merge it"
            )
        if value and setting not in _NEUTRAL:
            raise ValueError(f"{setting}={value!r:.80} is not served beside adapters of DVoRA; merge the adapter")


def _sizes(name: str, key_A: str, key_B: str, entries: Entries, config: LoraConfig) -> LoRASizes:
    shapes = [entries[key][1] for key in (key_A, key_B) if key in entries]
    if len(shapes) != 2 or any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
        raise ValueError(f"{name} has factors of shapes {shapes}, expected (r, in) and (out, r) of a linear layer")
    (rank, in_features), (out_features, _) = shapes
    if rank != value_of(config.rank_pattern or {}, name, config.r):
        raise ValueError(f"{name} has rank {rank}, and another one in r or rank_pattern; save the adapter again")
    alpha = value_of(config.alpha_pattern or {}, name, config.lora_alpha)
    return LoRASizes(name, in_features, out_features, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
