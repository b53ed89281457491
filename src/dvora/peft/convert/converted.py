"""The result of a conversion: configuration and values of an adapter of another method, ready to be saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, contiguous_format, nn

from ..injecting import matches


class Converted(NamedTuple):
    """An adapter that no model has yet."""

    config: PeftConfig
    values: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write it into a folder as PEFT writes adapters."""
        folder.mkdir(exist_ok=True)
        # With bias="all" PEFT lists a head's bias twice, and a file takes no tensor twice.
        own = {name: value.detach().cpu().clone(memory_format=contiguous_format) for name, value in self.values.items()}
        save_file(own, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


def kept_settings(config: PeftConfig) -> dict[str, Any]:
    """The settings that do not depend on the method: the base, the task, and modules trained whole."""
    settings = vars(config)
    names = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
    return {name: settings[name] for name in names} | {"inference_mode": True}


def other_entries(model: PeftModel, adapter_name: str, vectors: str) -> dict[str, Tensor]:
    """The entries of an adapter's file that do not belong to its method: heads, biases, tokens.

    Args:
        model: with the adapter.
        adapter_name: of the adapter.
        vectors: the beginning of the last part of the method's own names.
    """
    entries = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {key: value for key, value in entries.items() if not re.search(rf"\.{vectors}\w+$", key)}


def exact_targets(names: Iterable[str], model: nn.Module) -> list[str] | str:
    """Target modules that PEFT matches with these layers and no others: their names, or an expression if need be.

    PEFT takes a name for the end of one, so "layer" would target "encoder.layer" too.

    Args:
        names: of the layers in the base model.
        model: the base model, or one with adapters in it.
    """
    wanted = sorted(names)
    others = {name for name, _ in model.named_modules()}.difference(wanted)
    if not any(matches(wanted, other) for other in others):
        return wanted
    return "|".join(re.escape(name) for name in wanted)


def exact_pattern(values: Mapping[str, int], usual: int) -> dict[str, int]:
    """A pattern by layer name for PEFT, which takes the first name that a layer's ends in: the longest come first."""
    if set(values.values()) <= {usual}:
        return {}
    return {name: values[name] for name in sorted(values, key=lambda name: (-len(name), name))}
