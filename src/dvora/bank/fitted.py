"""A bank's side of one model: its layers, how adapters become rows for them, the slots, and the hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..peft.restoring import on_failure
from .factors import FactorRows
from .hooks import HeadHook, LayerHook, check_without_bank
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
        check_without_bank(model)
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


class ModelSide:
    """A bank's side of its model, as soon as an adapter says which it is; safe under threads.

    Args:
        fit: makes it for an adapter.
        current: tells the batch that a thread is in.
    """

    def __init__(self, fit: Callable[[Source], FittedModel], current: CurrentRows) -> None:
        self.fitted: FittedModel | None = None
        self._fit, self._current = fit, current
        self._lock = threading.RLock()
        """Held while layers are hooked."""
        self._closed = False

    def known(self) -> FittedModel:
        """What an adapter has said.

        Raises:
            ValueError: none has so far, or the bank was closed.
        """
        self._check_open()
        if self.fitted is None:
            raise ValueError(
                "the bank does not know yet which layers it serves; add the folder of an adapter first, or pass like="
            )
        return self.fitted

    def fit(self, source: Source) -> FittedModel:
        """What the first adapter said, or now says.

        Raises:
            TypeError, ValueError: see `FittedModel.of`; or the bank was closed.
        """
        with self._lock:
            self._check_open()
            if self.fitted is None:
                self.fitted = self._fit(source)
            return self.fitted

    @contextmanager
    def adding(self, is_used: Callable[[], bool]) -> Iterator[None]:
        """Around what adds adapters: the first are added by one thread at a time, and if refused, hook no layer.

        Args:
            is_used: whether the bank has adapters.
        """
        if self.fitted is not None:
            yield
            return
        with self._lock:
            was_fitted = self.fitted is not None
            with on_failure(lambda: None if was_fitted or is_used() else self._unhook()):
                yield

    def close(self) -> None:
        """Free the model for good.

        Raises:
            ValueError: batches run, which would have the base's outputs; nothing is closed then.
        """
        with self._lock:
            if self._current.rows is not None:
                raise ValueError("this thread is in a batch of the bank; leave its `with` block before it is closed")
            if self.fitted is not None:
                self.fitted.slots.close()
            self._closed = True
            self._unhook()

    def _unhook(self) -> None:
        if self.fitted is not None:
            self.fitted.served.unhook(self.fitted.hooks)
        self.fitted = None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the bank was closed; make a new one")
