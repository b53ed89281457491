"""Passes the adapter names of a batch to every layer, for one call of the model and in its thread only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layers.layer import DVoRALayer
from .layers.mixed_rows import BASE, Batch, in_progress, is_in_progress
from .layers.param_wrapper import ParamWrapper
from .restoring import surely


@contextmanager
def adapter_names_passed(model: nn.Module, names: Sequence[str], beams: int, encoder: set[nn.Module]) -> Iterator[None]:
    """Pass `adapter_names` to the adapted layers.

    Args:
        model: with adapters.
        names: one a row of the batch, or `BASE`.
        beams: beam search repeats every row that often in all modules but the encoder's.
        encoder: the modules of the encoder.

    Raises:
        ValueError: a name is unknown, a row asks for an adapter of a parameter, or the model is in training mode.
    """
    if model.training:
        raise ValueError("adapter_names works for inference only; call model.eval() first")
    # A layer may be in several places.
    called = list(dict.fromkeys(_called_in(model)))
    layers = [module for module in called if isinstance(module, DVoRALayer)]
    known = {name for layer in layers for name in layer.dvora_adapted}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names: no adapter is named {', '.join(unknown)}; there are {sorted(known)}")
    parameters = [layer for layer in layers if isinstance(layer, ParamWrapper)]
    for layer in parameters:
        layer.check_serves_all_rows(names)
    batch = Batch([name for name in names for _ in range(beams)], list(names))
    handles: list[RemovableHandle] = []

    def leave() -> None:
        for handle in handles:
            handle.remove()
        for layer in parameters:
            if batch in layer.silent_in:
                layer.silent_in.remove(batch)

    with surely(leave):
        # Otherwise their active adapters would change every row.
        for layer in parameters:
            layer.silent_in.append(batch)
        for module in called:
            if isinstance(module, ParamWrapper):
                continue
            passing = partial(_pass, batch=batch, names=batch.in_encoder if module in encoder else batch.names)
            handles.append(module.register_forward_pre_hook(passing, with_kwargs=True))
        with in_progress(batch):
            yield


def _called_in(module: nn.Module) -> Iterator[nn.Module]:
    """Adapted layers, and modules that are saved whole, without what adapters have in them: that may be thousands."""
    if isinstance(module, DVoRALayer | AuxiliaryTrainingWrapper):
        yield module
    for child in [module.base_layer] if isinstance(module, DVoRALayer) else module.children():
        yield from _called_in(child)


def _pass(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    batch: Batch,
    names: Sequence[str],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # Another thread may run a hook that is only half registered or removed: then without `kwargs`.
    if kwargs is None or not is_in_progress(batch):
        return None
    return args, {**kwargs, "adapter_names": names}
