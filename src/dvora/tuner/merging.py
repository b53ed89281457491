"""Merging the adapters of a whole model: all layers or none, and one report of what rounding took."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn

from ..merging import warn_of_losses
from .base import check_mergeable as check_layer
from .layer import DVoRALayer, layers_in


def merge_model(
    model: nn.Module, adapter_names: list[str] | None, keep_original: bool, safe_merge: bool
) -> dict[str, float]:
    """Merge adapters into the weights of all layers, and tokens that PEFT trains whole into theirs.

    Args:
        model: with the adapters.
        adapter_names: which of them; None means those that are active in each layer.
        keep_original: keep a copy of every weight, so that it can be unmerged.
        safe_merge: PEFT's switch for its own layers.

    Returns:
        The share of the update that rounding changed, by layer name.

    Raises:
        TypeError, ValueError: some layer cannot be merged; none is then.

    Warns:
        MergePrecisionWarning: once, with the figures, if the dtype swallows a considerable part of the update.
    """
    _check_mergeable(model, adapter_names)
    losses: dict[str, float] = {}
    dtype = torch.float32
    for layer in layers_in(model):
        with onload_layer(layer):
            losses |= layer.merge_quietly(adapter_names, keep_original)
            stored = layer.stored()
            dtype = dtype if stored is None else stored.dtype
    for other in _other_layers(model):
        with onload_layer(other):
            other.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    warn_of_losses(losses, dtype)
    return losses


def unmerge_model(model: nn.Module) -> None:
    """Put the weights of all layers back, bit for bit."""
    merged = [layer for layer in layers_in(model) if layer.merged]
    if not merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    for layer in [*merged, *(other for other in _other_layers(model) if other.merged)]:
        with onload_layer(layer):
            layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within it a model in evaluation has its active adapters merged, and runs as fast as its base.

    The weights' own bits come back at the end, from copies that are kept on the CPU until then.

    Args:
        model: with adapters, in evaluation mode.

    Raises:
        TypeError: a layer is quantised or computes its weight in every pass; nothing is merged.
        ValueError: the model is in training mode, has no adapters or has merged ones, or a value is not finite.

    Warns:
        MergePrecisionWarning: the dtype swallows a considerable part of the update.
    """
    layers = layers_in(model)
    if not layers:
        raise ValueError(f"model of type {type(model).__name__} has no DVoRA layers to merge")
    if model.training:
        raise ValueError("merged is for evaluation, and merged adapters cannot be trained; call model.eval() first")
    if already := [layer.name for layer in layers if layer.merged]:
        raise ValueError(f"adapters are merged already (in {already[0]} and others); call unmerge_adapter first")
    merge_model(model, None, keep_original=True, safe_merge=False)
    try:
        yield
    finally:
        if any(layer.merged for layer in layers):
            unmerge_model(model)


def _other_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """PEFT's own, such as those of tokens that are trained whole."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DVoRALayer)]


def _check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse a merge that cannot be done whole, before any layer is merged.

    Raises:
        TypeError: a layer is quantised or computes its weight in every pass.
        ValueError: a vector is not finite or a magnitude exceeds the weight's dtype, or a layer's weight belongs to
            another module too, such as an embedding tied to the head.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for layer in layers_in(model):
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in layer.dvora_adapted]
        if names:
            check_layer(layer.get_base_layer(), layer.kind, layer.parameter_name, layer.name)
            _check_not_tied(layer, owners)
        for name in names:
            _check_range(layer, name)


def _check_not_tied(layer: DVoRALayer, owners: dict[int, list[str]]) -> None:
    if len(names := owners.get(id(layer.stored()), [])) > 1:
        raise ValueError(
            f"{layer.name}: its weight is tied ({' and '.join(names)} are one tensor), so merging would change "
            "the other layer too; untie the weights in the base model first, or keep the adapter unmerged"
        )


def _check_range(layer: DVoRALayer, adapter_name: str) -> None:
    vectors, stored = layer.vectors(adapter_name), layer.stored()
    assert stored is not None
    # The magnitude is the norm of a merged row, so it bounds every merged value.
    fits = vectors.magnitude.abs().max() <= torch.finfo(stored.dtype).max
    if not (fits and all(vector.isfinite().all() for vector in vectors)):
        raise ValueError(
            f"{layer.name}: adapter {adapter_name!r} has values that are not finite or too large for {stored.dtype}; "
            "nothing was merged. Its training diverged: go back to an earlier checkpoint"
        )
