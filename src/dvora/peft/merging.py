"""Merging the adapters of a whole model: all layers or none, and one warning about rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import Tensor, nn

from ..weight import warn_of_losses
from .layers.layer import DVoRALayer, layers_in
from .layers.mergeable import Intent
from .restoring import surely


def merge_model(
    model: nn.Module, adapter_names: list[str] | None, keep_original: bool, safe_merge: bool
) -> dict[str, float]:
    """Merge adapters into the weights of all layers, and tokens that PEFT trains whole into theirs.

    All layers or none: after an error or an interruption the weights are restored bit for bit, from copies of every
    adapted weight on the CPU.

    Args:
        model: with the adapters.
        adapter_names: which of them; None means those that are active in each layer.
        keep_original: keep the copies, so that it can be unmerged. False copies one weight at a time, for a model that
            is thrown away if merging fails: layers merged until then stay so.
        safe_merge: PEFT's switch for its own layers.

    Returns:
        The share of the update that rounding changed, by layer name.

    Raises:
        TypeError, ValueError: some layer cannot be merged; none is then.

    Warns:
        MergePrecisionWarning: once, with the figures, if rounding removes a considerable part of the update.
    """
    if not keep_original:
        return _merge_for_good(model, adapter_names, safe_merge)
    with merging(model, adapter_names, safe_merge) as losses:
        return losses


@contextmanager
def merging(
    model: nn.Module, adapter_names: list[str] | None, safe_merge: bool, undo: Callable[[], object] | None = None
) -> Iterator[dict[str, float]]:
    """Merge as `merge_model` does; if anything is raised within, all is put back.

    Args:
        model, adapter_names, safe_merge: as there.
        undo: is called first then, and may be called again at any point.

    Yields:
        The share of the update that rounding changed, by layer name.
    """
    _check_mergeable(model, adapter_names)
    intent, layers, others, losses = Intent(), layers_in(model), _Others(model), dict[str, float]()

    def settle() -> None:
        if undo is not None and not intent.done:
            undo()
        for layer in layers:
            layer.settle()
        if not intent.done:
            others.put_back()

    with surely(settle):
        for layer in layers:
            losses |= layer.merge_quietly(adapter_names, intent)
        others.merge(adapter_names, safe_merge)
        warn_of_losses(losses, _dtype_of(model))
        yield losses
        intent.done = True


def unmerge_model(model: nn.Module) -> None:
    """Put the weights of all layers back, bit for bit.

    Raises:
        TypeError, ValueError: some weight cannot be set now; none is then.
    """
    merged, others = [layer for layer in layers_in(model) if layer.merged], _Others(model)
    if not merged and not others.merged():
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
    intent = Intent()
    intent.done = True
    for layer in merged:
        layer.rest_on(intent)

    def settle() -> None:
        for layer in merged:
            layer.settle()
        if not intent.done:
            others.unmerge()

    with surely(settle):
        intent.revoke()


def unmerge_before_adding(model: nn.Module) -> None:
    """Unmerge a model that gets another adapter, as PEFT does, but all layers at once and before anything is changed.

    Warns:
        UserWarning: there was something to unmerge.
    """
    if any(layer.merged for layer in layers_in(model)):
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=4)
        unmerge_model(model)


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

    def unmerge() -> None:
        if any(layer.merged for layer in layers):
            unmerge_model(model)

    with surely(unmerge):
        merge_model(model, None, keep_original=True, safe_merge=False)
        yield


def _merge_for_good(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> dict[str, float]:
    _check_mergeable(model, adapter_names)
    losses: dict[str, float] = {}
    for layer in layers_in(model):
        intent = Intent()
        with surely(layer.settle):
            losses |= layer.merge_quietly(adapter_names, intent)
            intent.done = True
        layer.merges.give_up_original()
    _Others(model).merge(adapter_names, safe_merge)
    warn_of_losses(losses, _dtype_of(model))
    return losses


class _Others:
    """Mergeable layers that are PEFT's own, such as those of tokens that are trained whole."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, DVoRALayer)]
        self._names = [list(layer.merged_adapters) for layer in self._layers]
        self._weights: list[Tensor] = []

    def merged(self) -> bool:
        """Whether there are adapters in one of them."""
        return any(layer.merged for layer in self._layers)

    def merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Merge all of them."""
        self._weights = [layer.weight.detach().to("cpu", copy=True) for layer in self._layers]
        for layer in self._layers:
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo `merge`."""
        for layer, names, weight in zip(self._layers, self._names, self._weights, strict=False):
            layer.merged_adapters[:] = names
            layer.weight.copy_(weight)

    def unmerge(self) -> None:
        """Unmerge all of them; may be called again after an interruption."""
        while self._layers:
            layer, names = self._layers[-1], self._names[-1]
            layer.merged_adapters[:] = names
            if names:
                with onload_layer(layer):
                    layer.unmerge()
            del self._layers[-1], self._names[-1]


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the last weight, for the message."""
    stored = [weight for layer in layers_in(model) if (weight := layer.stored()) is not None]
    return stored[-1].dtype if stored else torch.float32


def _check_mergeable(model: nn.Module, adapter_names: list[str] | None) -> None:
    """Refuse a merge that cannot be done whole, before any layer is merged.

    Raises:
        TypeError: a layer is quantised or computes its weight in every pass.
        ValueError: a layer's weight belongs to another module too, such as an embedding tied to the head.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    for layer in layers_in(model):
        wanted = layer.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in layer.dvora_adapted]
        if names:
            layer.check_mergeable()
            _check_not_tied(layer, owners)


def _check_not_tied(layer: DVoRALayer, owners: dict[int, list[str]]) -> None:
    if len(names := owners.get(id(layer.stored()), [])) > 1:
        raise ValueError(
            f"{layer.name}: its weight is tied ({' and '.join(names)} are one tensor), so merging would change "
            "the other layer too; untie the weights in the base model first, or keep the adapter unmerged"
        )
