"""An adapter of any of PEFT's methods on its base model."""

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

import dvora

from ..settings import NOTHING, Trust
from .adapter_folder import Adapter, adapter_on
from .bases import config_of, load_model, model_class, set_labels


def load_adapted(
    adapter: Adapter, model: str | None, trust: Trust = NOTHING, dtype: torch.dtype | str = "auto"
) -> PeftModel:
    """The base model with the adapter, in evaluation mode.

    Args:
        adapter: of `read_adapter`.
        model: the base, a folder or a name on the hub; None takes the one that the adapter names.
        trust: whether a base that only the adapter names may be fetched; one that the caller names may be.
        dtype: of the base's weights; "auto" means as they are stored.

    Raises:
        ValueError: the base cannot be read, or the adapter does not fit.
    """
    assert dvora.__version__  # importing it makes the method known to PEFT
    trust = of_base(model, trust)
    base = adapter.base(model)
    loaded, _ = load_model(base, *base_class(adapter, base, trust), dtype, trust=trust)
    return adapter_on(loaded.requires_grad_(False), adapter)


def of_base(model: str | None, trust: Trust) -> Trust:
    """What is allowed for the base: to fetch it, if the caller names it."""
    return replace(trust, download=trust.download or model is not None)


def base_class(adapter: Adapter, base: str, trust: Trust) -> tuple[Any, Any]:
    """The class of an adapter's base model, and its configuration with as many labels as the adapter's head has."""
    config = config_of(base, trust)
    mapping = adapter.settings.get("auto_mapping") or {}
    make = model_class(config, adapter.settings.get("task_type"), mapping.get("base_model_class"))
    if (count := adapter.label_count) is not None:
        config.num_labels = count
    set_labels(config, adapter.labels)
    if getattr(config, "pad_token_id", None) is None:
        # Classifiers of decoders look for the end of a text by it; `dvora train` pads with this token too.
        ends = getattr(config, "eos_token_id", None)
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    return make, config
