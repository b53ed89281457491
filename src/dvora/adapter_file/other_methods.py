"""Adapters of LoRA, (IA)3 and RoAd as PEFT saves them, for serving beside adapters of DVoRA.

Taken is what computes just the method in linear layers; whatever changes the computation or the base is refused by the
setting's name. Their files do not say which base they belong to: only names and sizes of layers can be compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from peft import IA3Config, IA3Model, LoraConfig, LoraModel, PeftConfig, RoadConfig, RoadModel, TaskType
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn

from . import lora
from .content import Content, FactorSizes, SavedWhole, is_trained_whole
from .patterns import check_expressions
from .scales import ia3_sizes, road_sizes
from .settings import MAX_NAMES, DVoRAConfig
from .values_file import Entries, plain_key


class Method(NamedTuple):
    """How a method's files are read."""

    tuner: type[BaseTuner]
    """Of PEFT, which says what it adapts."""
    factors: tuple[str, ...]
    """Of a layer, by the ends of their keys."""
    settings: Collection[str]
    """That change nothing else, whatever they are, beside those of all methods."""
    sizes: Callable[[Any, Any], list[FactorSizes]]
    """Of the layers, from shapes by layer and the configuration."""


METHODS: Mapping[type[PeftConfig], Method] = {
    LoraConfig: Method(LoraModel, lora.FACTORS, lora.SETTINGS, lora.lora_sizes),
    IA3Config: Method(IA3Model, ("ia3_l",), ("feedforward_modules", "init_ia3_weights"), ia3_sizes),
    RoadConfig: Method(RoadModel, ("road_theta", "road_alpha"), ("variant", "group_size", "init_weights"), road_sizes),
}
_SETTINGS = {
    *("target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "task_type", "peft_type"),
    *("auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
}
_HEADS = {
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
    config.modules_to_save = modules = sorted({*(config.modules_to_save or ()), *_HEADS.get(config.task_type, ())})
    common = DVoRAConfig(target_modules=[], modules_to_save=modules or None, task_type=config.task_type)
    common.other = config
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
    # PEFT compares all names of a list with all layers.
    longest = max(len(keys), *(len(value) for value in vars(config).values() if isinstance(value, list | set)))
    if longest > MAX_NAMES:
        raise ValueError(f"its settings or its file name {longest} layers, expected at most {MAX_NAMES}")
    check_expressions(vars(config), keys)
    for name, of_layer in keys.items():
        if missing := [factor for factor in method.factors if factor not in of_layer]:
            raise ValueError(f"{name} has no {missing[0]} in the file; save the adapter again")
    factors = {name: tuple(keys[name][factor] for factor in method.factors) for name in sorted(keys)}
    sizes = method.sizes({name: [entries[key][1] for key in factors[name]] for name in factors}, config)
    # Else the model says which layers these are.
    if str(config.target_modules).lower() not in ("none", INCLUDE_LINEAR_LAYERS_SHORTHAND):
        check_named(config, sizes)
    parts = tuple(SavedWhole(name, entries[whole[name]][1]) for name in sorted(whole))
    content = Content.of_saved(common, {})._replace(whole=parts, factors=tuple(sizes))
    return common, content, Names(factors, whole)


def check_named(config: Any, factors: Sequence[FactorSizes], modules: Sequence[str] = ()) -> list[str]:
    """Which modules of a model settings name and a file lacks; what PEFT would leave out of the file is refused.

    Args:
        config: of an adapter; of `with_targets`, where it leaves it to the model which layers it names.
        factors: that the file has.
        modules: of the model, by name.

    Raises:
        ValueError: settings leave a layer out, or say otherwise whether its scales are of inputs.
    """
    is_targeted = METHODS[type(config)].tuner._check_target_module_exists
    check_expressions(vars(config), names := [*(sizes.name for sizes in factors), *modules])
    targets = {name for name in names if is_targeted(config, name)}
    says_of_what = isinstance(config, IA3Config) and config.feedforward_modules is not None
    for name, _, in_features, *_ in factors:
        if name not in targets:
            raise ValueError(
                f"{name} has factors in the file, and its settings leave the layer out (target_modules, "
                "exclude_modules, modules_to_save, layers_to_transform), as PEFT does then; correct the settings, or "
                "take the factors out of the file"
            )
        if says_of_what and IA3Model._check_target_module_feedforward(config, name) != (in_features is not None):
            raise ValueError(
                f"{name} has scales of {'inputs' if in_features else 'outputs'} in the file, and "
                f"feedforward_modules={config.feedforward_modules!r:.200} says otherwise; correct that setting"
            )
    return sorted(targets.difference(sizes.name for sizes in factors))


def with_targets(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """The settings of an adapter with PEFT's names of layers, where they leave it to the model which to adapt."""
    # Only its methods are asked: one that is made adapts the model.
    tuner = object.__new__(METHODS[type(config)].tuner)
    config = tuner._prepare_adapter_config(copy.deepcopy(config), tuner.get_model_config(model))
    return _maybe_include_all_linear_layers(config, model)
