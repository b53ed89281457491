"""Hands the adapter names of a batch to every layer for the time of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import DVoRALayer, layers_in
from .parameters import ParamWrapper
from .rows import BASE


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
    layers = layers_in(model)
    known = {name for layer in layers for name in layer.dvora_adapted}
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names: no adapter is named {', '.join(unknown)}; there are {sorted(known)}")
    parameters = [layer for layer in layers if isinstance(layer, ParamWrapper)]
    for layer in parameters:
        layer.check_serves_all_rows(names)
    repeated = [name for name in names for _ in range(beams)]
    handles = [
        module.register_forward_pre_hook(
            partial(_pass, names=list(names) if module in encoder else repeated), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, DVoRALayer | AuxiliaryTrainingWrapper) and not isinstance(module, ParamWrapper)
    ]
    # Their active adapters would serve every row.
    active = [layer.active_adapters for layer in parameters]
    try:
        for layer in parameters:
            layer._active_adapter = []
        yield
    finally:
        for layer, adapters in zip(parameters, active, strict=True):
            layer._active_adapter = adapters
        for handle in handles:
            handle.remove()


def _pass(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
