"""Merging the adapters of a whole model: all layers or none, and one warning about rounding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from ..weight import warn_of_losses
from .layer import DVoRALayer, MergeState, layers_in
from .restoring import restored_on_error


def merge_model(
    model: nn.Module, adapter_names: list[str] | None, keep_original: bool, safe_merge: bool
) -> dict[str, float]:
    """Merge adapters into the weights of all layers, and tokens that PEFT trains whole into theirs; all or none.

    Args:
        model: with the adapters.
        adapter_names: which of them; None means those that are active in each layer.
        keep_original: keep copies of all adapted weights on the CPU, so that it can be unmerged. False copies one
            weight at a time, for a model that is thrown away if merging fails: layers merged until then stay so.
        safe_merge: PEFT's switch for its own layers.

    Returns:
        The share of the update that rounding changed, by layer name.

    Raises:
        TypeError, ValueError: some layer cannot be merged; none is then.

    Warns:
        MergePrecisionWarning: once, with the figures, if rounding removes a considerable part of the update.
    """
    if keep_original:
        with merged_or_restored(model, adapter_names, safe_merge) as losses:
            return losses
    _check_mergeable(model, adapter_names)
    losses = {}
    for layer in layers_in(model):
        # Without the way back, so that each copy goes before the next one is made.
        losses |= layer.merge_quietly(adapter_names, ExitStack())
        layer.original = None
    _merge_others(model, adapter_names, safe_merge, ExitStack())
    warn_of_losses(losses, _dtype_of(model))
    return losses


@contextmanager
def merged_or_restored(
    model: nn.Module, adapter_names: list[str] | None, safe_merge: bool
) -> Iterator[dict[str, float]]:
    """Merge as `merge_model` does; if anything is raised, also within the block, all weights are restored."""
    _check_mergeable(model, adapter_names)
    losses: dict[str, float] = {}
    with restored_on_error(model) as undo:
        for layer in layers_in(model):
            losses |= layer.merge_quietly(adapter_names, undo)
        _merge_others(model, adapter_names, safe_merge, undo)
        warn_of_losses(losses, _dtype_of(model))
        yield losses


def unmerge_model(model: nn.Module) -> None:
    """Put the weights of all layers back, bit for bit.

    Raises:
        TypeError, ValueError: some weight cannot be set now; none is then.
    """
    layers = [layer for layer in layers_in(model) if layer.merged]
    others = [layer for layer in _others_in(model) if layer.merged]
    if not layers and not others:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    for layer in layers:
        layer.check_mergeable()
        layer.checked_original()
    for layer in layers:
        layer.restore(MergeState([], None, layer.checked_original()))
    for other in others:
        with onload_layer(other):
            other.unmerge()


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
        MergePrecisionWarning: rounding to the dtype removes a considerable part of the update.
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


def _others_in(model: nn.Module) -> list[BaseTunerLayer]:
    """Mergeable layers that are PEFT's own, such as those of tokens that are trained whole."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DVoRALayer)]


def _merge_others(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool, undo: ExitStack) -> None:
    """Merge PEFT's own layers; `undo` gets the way back."""
    for layer in _others_in(model):
        undo.callback(_restore, layer, list(layer.merged_adapters), layer.weight.detach().to("cpu", copy=True))
        with onload_layer(layer):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)


@torch.no_grad()
def _restore(layer: BaseTunerLayer, names: list[str], weight: Tensor) -> None:
    layer.merged_adapters[:] = names
    layer.weight.copy_(weight)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the last weight, for the message."""
    stored = [weight for layer in layers_in(model) if (weight := layer.stored()) is not None]
    return stored[-1].dtype if stored else torch.float32


def _check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse to merge into a weight that cannot be set, or is tied to another's, before any layer is merged."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for layer in layers_in(model):
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        if set(wanted).isdisjoint(layer.dvora_adapted):
            continue
        layer.check_mergeable()
        if len(names := owners.get(id(layer.stored()), [])) > 1:
            raise ValueError(
                f"{layer.name}: its weight is tied ({' and '.join(names)} are one tensor), so merging would change "
                "the other layer too; untie the weights in the base model first, or keep the adapter unmerged"
            )
