"""Checks of the vectors in a state dict before any of them is copied into a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from .layer import DVoRALayer
from .vectors import VECTORS


def checked_vectors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a loaded state dict, vectors in the layers' own dtype and checked but for their shapes.

    Args:
        model: with the adapter injected.
        adapter_name: its name.
        state_dict: keys as in the model's own state dict.

    Raises:
        ValueError: a vector is missing, unknown, not floating or not finite.
    """
    own = {
        f"{name}.{vector}.{adapter_name}": getattr(layer, vector)[adapter_name]
        for name, layer in model.named_modules()
        if isinstance(layer, DVoRALayer)
        for vector in VECTORS
        if adapter_name in getattr(layer, vector)
    }
    vector_key = re.compile(r"\.(" + "|".join(VECTORS) + r")(\.|$)")
    unknown = [key for key in state_dict if vector_key.search(key) and key not in own]
    if unknown:
        raise ValueError(f"the adapter has vectors for layers that are not adapted here: {_some(unknown)}")
    missing = [key for key in own if key not in state_dict]
    if missing:
        raise ValueError(f"the adapter lacks vectors of adapted layers: {_some(missing)}")
    return {k: _checked_vector(k, v, own[k]) if k in own else v for k, v in state_dict.items()}


def check_shapes(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse a state dict with vectors of other shapes than the model's, before any is copied.

    Args:
        model: with the adapters injected.
        state_dict: keys as in the model's own state dict, each after `prefix`.
        prefix: of the model's keys.

    Raises:
        ValueError: a vector has another shape.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, DVoRALayer):
            for vector in VECTORS:
                for adapter_name, own in getattr(layer, vector).items():
                    key = f"{prefix}{name}.{vector}.{adapter_name}"
                    loaded = state_dict.get(key)
                    if loaded is not None and loaded.shape != own.shape:
                        raise ValueError(
                            f"{key} has shape {tuple(loaded.shape)} in the adapter and {tuple(own.shape)} in the "
                            "model: another base model, or another rank than the configuration says; neither can be "
                            "changed by loading"
                        )


def _checked_vector(key: str, loaded: Tensor, own: Tensor) -> Tensor:
    if not loaded.is_floating_point():
        raise ValueError(f"{key} has dtype {loaded.dtype} in the adapter, expected a floating-point vector")
    if not loaded.isfinite().all():
        raise ValueError(
            f"{key} has values that are not finite in the adapter; the file is damaged or training diverged"
        )
    return loaded.to(own.dtype)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"
