"""Adapters of LoRA as PEFT saves them, `y + scaling B (A x)`, for serving beside adapters of DVoRA.

Taken is what computes just that in linear layers; whatever changes the computation or the base is refused by the
setting's name. Their files do not say which base they belong to: only names and sizes of layers can be compared.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig, LoraModel, PeftConfig, TaskType
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn

from .content import Content, LowRankSizes, SavedWhole, is_trained_whole
from .patterns import check_expressions, value_of
from .settings import MAX_NAMES, DVoRAConfig
from .values_file import Entries, Shape, plain_key

FACTORS = ("lora_A.weight", "lora_B.weight")
"""Of a layer, by the ends of their keys."""
_SETTINGS = {
    *("target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "task_type", "peft_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "eva_config", "qalora_group_size", "megatron_core"),
}
"""That change nothing else, whatever they are; `bias` and `init_lora_weights` are looked at."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it was."""
_HEADS: Mapping[str | None, Sequence[str]] = {
    TaskType.SEQ_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.TOKEN_CLS: SEQ_CLS_HEAD_NAMES,
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""What PEFT adds to `modules_to_save`, and so takes no factors of."""


class Names(NamedTuple):
    """Keys of a file by what they are of."""

    factors: Mapping[str, tuple[str, ...]]
    """By the layer's name."""
    whole: Mapping[str, str]
    """By the name of the part of a head."""


def read_lora(settings: bytes, config: Any, entries: Entries) -> tuple[DVoRAConfig, Content, Names]:
    """What an adapter of LoRA consists of: settings as of an adapter without layers of DVoRA, and its parts.

    Raises:
        TypeError, ValueError: it is of another method, computes something else than LoRA in linear layers, or its file
            is damaged.
    """
    # By the very type: AdaLoRA's is LoRA's with more.
    if type(config) is not LoraConfig:
        raise TypeError(
            f"it is an adapter of type {config.peft_type.value}, and only those of DVoRA and LoRA share a base in one "
            "batch; merge it (merge_and_unload) and serve the merged model, or run it by PEFT itself"
        )
    # PEFT drops those that it does not know.
    for setting, value in json.loads(settings).items():
        if value and setting not in _SETTINGS:
            raise ValueError(f"{setting}={value!r:.80} is not served beside adapters of DVoRA; merge the adapter")
    if config.bias != "none":
        raise ValueError(f"bias={config.bias!r:.80} is not served beside adapters of DVoRA; merge the adapter")
    if (start := config.init_lora_weights) not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r:.40} changes the base itself; convert the adapter to a plain one "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained), or merge it"
        )
    config.modules_to_save = modules = sorted({*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())})
    common = DVoRAConfig(target_modules=[], modules_to_save=modules or None, task_type=config.task_type)
    common.lora = config
    common.auto_mapping, common.base_model_name_or_path = config.auto_mapping, config.base_model_name_or_path
    keys: dict[str, dict[str, str]] = {}
    whole = {}
    for key in entries:
        name = plain_key(key)
        if (factor := next((end for end in FACTORS if name.endswith(f".{end}")), None)) is not None:
            keys.setdefault(name.removesuffix(f".{factor}"), {})[factor] = key
        elif is_trained_whole(key, common):
            whole[name] = key
        else:
            raise ValueError(f"{key} is of no linear layer and no head, and only these are served; merge the adapter")
    if not keys:
        raise ValueError(f"its file has no {' and '.join(FACTORS)} of any layer; save the adapter again")
    # PEFT compares all names of a list with all layers.
    longest = max(len(keys), *(len(value) for value in vars(config).values() if isinstance(value, list | set)))
    if longest > MAX_NAMES:
        raise ValueError(f"its settings or its file name {longest} layers, expected at most {MAX_NAMES}")
    check_expressions(vars(config), keys)
    for name, of_layer in keys.items():
        if missing := [factor for factor in FACTORS if factor not in of_layer]:
            raise ValueError(f"{name} has no {missing[0]} in the file; save the adapter again")
    factors = {name: tuple(keys[name][factor] for factor in FACTORS) for name in sorted(keys)}
    sizes = _sizes({name: [entries[key][1] for key in factors[name]] for name in factors}, config)
    # Else the model says which layers these are.
    if str(config.target_modules).lower() not in ("none", INCLUDE_LINEAR_LAYERS_SHORTHAND):
        check_named(config, sizes)
    parts = tuple(SavedWhole(name, entries[whole[name]][1]) for name in sorted(whole))
    content = Content.of_saved(common, {})._replace(whole=parts, factors=tuple(sizes))
    return common, content, Names(factors, whole)


def check_named(config: PeftConfig, factors: Sequence[LowRankSizes], modules: Sequence[str] = ()) -> list[str]:
    """Which modules of a model settings name and a file lacks; what PEFT would leave out of the file is refused.

    Args:
        config: of an adapter; of `with_targets`, where it leaves it to the model which layers it names.
        factors: that the file has.
        modules: of the model, by name.

    Raises:
        ValueError: settings leave a layer out.
    """
    check_expressions(vars(config), names := [*(sizes.name for sizes in factors), *modules])
    targets = {name for name in names if LoraModel._check_target_module_exists(config, name)}
    for sizes in factors:
        if sizes.name not in targets:
            raise ValueError(
                f"{sizes.name} has factors in the file, and its settings leave the layer out (target_modules, "
                "exclude_modules, modules_to_save, layers_to_transform), as PEFT does then; correct the settings, or "
                "take the factors out of the file"
            )
    return sorted(targets.difference(sizes.name for sizes in factors))


def with_targets(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The settings of an adapter with PEFT's names of layers, where they leave it to the model which to adapt."""
    # Only its methods are asked: one that is made adapts the model.
    tuner = object.__new__(LoraModel)
    config = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
    return _maybe_include_all_linear_layers(config, model)


def _sizes(shapes: Mapping[str, Sequence[Shape]], config: LoraConfig) -> list[LowRankSizes]:
    """What a file has of each layer, from the shapes of A and B."""
    sizes = []
    for name, (of_A, of_B) in shapes.items():
        if len(of_A) != 2 or len(of_B) != 2 or of_A[0] != of_B[1]:
            raise ValueError(
                f"{name} has factors of shapes {of_A} and {of_B}, expected (r, in) and (out, r) of a linear layer"
            )
        (rank, in_features), (out_features, _) = of_A, of_B
        if rank != value_of(config.rank_pattern or {}, name, config.r):
            raise ValueError(f"{name} has rank {rank}, and another one in r or rank_pattern; save the adapter again")
        alpha = value_of(config.alpha_pattern or {}, name, config.lora_alpha)
        scaling = float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
        sizes.append(LowRankSizes(name, in_features, out_features, rank, scaling))
    return sizes
