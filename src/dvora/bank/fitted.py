"""A bank's side of one model: its layers, how adapters become rows for them, the slots, and the hooks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .factors import FactorRows
from .hooks import HeadHook, LayerHook
from .rows import CurrentRows
from .served import ServedModel
from .slots import Slots
from .sources import Source


class FittedModel(NamedTuple):
    """What is known once the layers are: from the first adapter on."""

    served: ServedModel
    rows: FactorRows
    slots: Slots
    hooks: list[RemovableHandle]

    @classmethod
    def of(
        cls, model: nn.Module, first: Source, dtype: torch.dtype, slots: int, host_bytes: int, current: CurrentRows
    ) -> FittedModel:
        """Find and hook the layers that an adapter names.

        Args:
            model: the base.
            first: the adapter.
            dtype, slots, host_bytes: of the bank.
            current: tells the batch that a thread is in.

        Raises:
            TypeError, ValueError: a layer cannot be served, or `host_bytes` cannot hold one adapter.
        """
        served = ServedModel.of(model, first.read().config, first.content)
        rows = FactorRows(served, dtype)
        if (needed := rows.base().nbytes) > host_bytes:
            raise ValueError(f"host_bytes={host_bytes} cannot hold one adapter, which takes {needed} bytes")
        places = dict(zip((layer.name for layer in served.layers), rows.places, strict=True))
        made = Slots(slots, rows.base(), served.device)
        hooks = served.hook(
            lambda layer: LayerHook(layer, places[layer.name], current), lambda head: HeadHook(head, current)
        )
        return cls(served, rows, made, hooks)
