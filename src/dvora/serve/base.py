"""The base model in memory, its tokenizer, and the bank of adapters over it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..adapter_file.values import Description
from ..bank import AdapterBank
from ..recipes.models.adapters import base_class
from ..recipes.models.bases import config_of, heads_of, load_model, load_tokenizer, model_class
from ..recipes.settings import Trust
from ..rows.batch import Batch as BankBatch
from .requests import RefusedError, model_failed
from .settings import Settings
from .store import Stored

_log = logging.getLogger("dvora.serve")


@dataclass(eq=False)
class Base:
    """What the engine computes with; `enter` and `leave` are for whoever is `passing`.

    Args:
        source: the folder of the model, or its name on the hub.
        model: in evaluation mode.
        tokenizer: of the model.
        bank: of the model.
        has_own_head: whether a classifier came with the base, so that rows without an adapter mean something.
    """

    source: str
    model: Any
    tokenizer: Any
    bank: AdapterBank
    has_own_head: bool
    passing: threading.RLock = field(default_factory=threading.RLock)
    """Held during every pass of the model."""
    _names: list[str | None] | None = None
    _batch: BankBatch | None = None
    _entered: ExitStack = field(default_factory=ExitStack)

    @property
    def generates(self) -> bool:
        """Whether it is a language model; else an encoder."""
        return self.model.get_output_embeddings() is not None and self.model.can_generate()

    @property
    def classifies(self) -> bool:
        """Whether the encoder has a head, its own or those of adapters."""
        return not self.generates and bool(heads_of(self.model))

    @cached_property
    def name(self) -> str:
        """What clients call it."""
        path = Path(self.source)
        return path.resolve().name if path.is_dir() else self.source

    def enter(self, adapters: Sequence[str | None]) -> BankBatch | None:
        """Give the rows of the next passes these adapters; staying in a batch of the bank while they are the same.

        Returns:
            The batch; None where no adapter has ever been, so that rows can only be the base's.
        """
        names = list(adapters)
        if names != self._names or self.bank.serves != (self._batch is not None):
            self.leave()
            if self.bank.serves:
                self._batch = self._entered.enter_context(self.bank.rows(names))
            self._names = names
        return self._batch

    def leave(self) -> None:
        """Give back the slots of the last rows."""
        self._names = self._batch = None
        self._entered.close()

    def unreadable(self, adapters: Sequence[str | None]) -> dict[str | None, RefusedError]:
        """Enter a batch, or say which of its adapters cannot be read any more: entered alone, without a pass."""
        try:
            self.enter(adapters)
            return {}
        except Exception as error:
            _log.warning("the adapters of a batch cannot be read: %s", error)
            if len({*adapters}) == 1:
                message = "the adapter's files were changed or removed since it was loaded; load it again"
                is_of_files = isinstance(error, ValueError | OSError)
                return {adapters[0]: RefusedError(422, message, "adapter_error") if is_of_files else model_failed()}
        alone = [self.unreadable([adapter]) for adapter in dict.fromkeys(adapters)]
        return {adapter: error for errors in alone for adapter, error in errors.items()}

    def check_task(self, description: Description) -> None:
        """Refuse an adapter for which a server that starts again could load another class of the base.

        Raises:
            ValueError: it is one.
        """
        settings, here = json.loads(description.settings), type(self.model).__name__
        task, named = settings.get("task_type"), (settings.get("auto_mapping") or {}).get("base_model_class")
        works = "CAUSAL_LM" if self.generates else "SEQ_CLS" if self.classifies else "FEATURE_EXTRACTION"
        if task is None and named in (None, here) and here in (named, *(self.model.config.architectures or ())):
            return
        if task != works:
            raise ValueError(f"its task_type is {task!r:.40}, and this server's adapters have {works!r}")

    @contextmanager
    def between_passes(self) -> Iterator[None]:
        """Within it no pass runs, and none goes on in a batch from before: for hooking layers, and for freeing them."""
        with self.passing:
            self.leave()
            yield


def open_base(settings: Settings, first: Stored | None) -> Base:
    """Load a base model, with a bank for the kind of adapters that it will have.

    Args:
        settings: of the server.
        first: of one of the adapters, whose task decides on the class and the head; None: as the model was saved.

    Raises:
        ValueError: it cannot be read, or is of no class that is served.
    """
    source, dtype, trust = settings.base, settings.dtype, Trust(download=settings.download)
    if first is None:
        config = config_of(source, trust)
        kind = model_class(config)
    else:
        kind, config = base_class(first.adapter, source, trust)
    model, new = load_model(source, kind, config, dtype if dtype == "auto" else getattr(torch, dtype), trust=trust)
    model.requires_grad_(False)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tokenizer = load_tokenizer(source, trust)
    heads = heads_of(model)
    has_own_head = bool(heads) and not any(key.partition(".")[0] in heads for key in new)
    bank = AdapterBank(
        model,
        slots=settings.slots,
        host_bytes=int(settings.host_memory * 2**30),
        head_bytes=int(settings.head_memory * 2**30),
        # Rows that would get an untrained one are refused in `Call.rows`.
        own_heads=True,
    )
    return Base(source, model, tokenizer, bank, has_own_head)
