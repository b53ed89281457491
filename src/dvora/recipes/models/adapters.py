"""An adapter of any of PEFT's methods on its base model."""

from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

import dvora

from ..settings import NOTHING, Trust
from .adapter_folder import Adapter, adapter_on
from .bases import TOKENIZER_FILES, config_of, lacks, load_model, load_tokenizer, model_class, set_labels


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
        config.pad_token_id = _padding(base, config, trust)
    return make, config


def _padding(base: str, config: Any, trust: Trust) -> int | None:
    """The token by which classifiers of decoders find the end of a text: that with which `dvora train` pads."""
    # None for images, which have no tokenizer on the hub either.
    if (words := getattr(config.get_text_config(), "vocab_size", None)) and not lacks(base, TOKENIZER_FILES):
        token: int | None = load_tokenizer(base, trust).pad_token_id
        # An embedding takes no other for padding.
        if token in range(words):
            return token
    ends = getattr(config, "eos_token_id", None)
    return ends[0] if isinstance(ends, list) else ends
