"""The engine: one thread that schedules, runs and answers, batch after batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..bank import Batch as BankBatch
from ..recipes.models.pooling import pooled, pooling_of
from .base import Base
from .metrics import Metrics
from .requests import Answer, RefusedError, Request, model_failed, not_finite
from .scheduler import PASS_ON_ACCELERATOR, PASS_ON_CPU, Batch, Scheduler
from .settings import Limits

_log = logging.getLogger("dvora.serve")


class Encoder:
    """The forward pass of an encoder."""

    def __init__(self, base: Base) -> None:
        self.base, self.pooling = base, pooling_of(Path(base.source))
        # Decoders that classify make a cache of keys, with which no block is shared.
        base.model.config.use_cache = False

    @torch.no_grad()
    def run(self, batch: Batch, rows: BankBatch) -> list[tuple[Request, Answer]]:
        """The answers of a batch, whose rows have their adapters."""
        model = self.base.model
        columns: dict[str, Any] = {"input_ids": [request.tokens for request in batch.requests]}
        if any(request.token_types is not None for request in batch.requests):
            # Tokens that a client sends have none.
            columns["token_type_ids"] = [request.token_types or [0] * request.length for request in batch.requests]
        inputs = self.base.tokenizer.pad(columns, return_tensors="pt").to(model.device)
        if batch.kind == "embed":
            hidden = model.base_model(**inputs).last_hidden_state
            values = list(pooled(hidden, inputs["attention_mask"], self.pooling).cpu())
        else:
            logits = model(**inputs).logits.float().cpu()
            # Of several heads the last one gives them: DistilBERT's has two.
            values = rows.split(logits, [*rows.widths][-1]) if rows.widths else list(logits)
            if logits.dim() == 3:
                # Of tokens, without those that fill rows up.
                values = [row[mask] for row, mask in zip(values, inputs["attention_mask"].bool().cpu(), strict=True)]
        answers = [Answer(value) if value.isfinite().all() else Answer(error=not_finite()) for value in values]
        return list(zip(batch.requests, answers, strict=True))


class Engine:
    """Serves requests over one base, which only its thread uses, until it is closed.

    Args:
        base: with its bank.
        limits: of the server.
        metrics: to count in.
    """

    def __init__(self, base: Base, limits: Limits, metrics: Metrics) -> None:
        self.base, self.metrics = base, metrics
        self._scheduler = Scheduler(limits, PASS_ON_CPU if base.model.device.type == "cpu" else PASS_ON_ACCELERATOR)
        self._encoder = Encoder(base)
        self._changed = threading.Condition()
        self._is_draining = False
        self._thread = threading.Thread(target=self._loop, name="dvora-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their batch: all of them, or none: 429, if too many wait, 503, if the server stops."""
        with self._changed:
            if not self.takes_requests:
                raise RefusedError(503, "the server is stopping; send the request elsewhere", "unavailable")
            for request in self._scheduler.add(requests):
                request.answer(Answer(error=self._scheduler.overloaded(request)))
            self._changed.notify()

    def cancel(self, requests: Sequence[Request]) -> None:
        """Drop requests that nobody waits for any more, before the next batch."""
        with self._changed:
            for request in requests:
                request.is_cancelled = True
            self._scheduler.remove(requests)
            self._changed.notify()

    def waiting(self) -> list[Request]:
        """The requests that wait."""
        with self._changed:
            return [*self._scheduler.all_waiting()]

    @property
    def takes_requests(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and not self._is_draining

    @property
    def is_alive(self) -> bool:
        """Whether batches are made."""
        return self._thread.is_alive()

    def close(self, seconds: float) -> None:
        """Answer what has been taken, and stop; after some seconds the rest is refused."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._changed:
                left = [*self._scheduler.all_waiting()]
                for request in left:
                    request.answer(Answer(error=RefusedError(503, "the server has stopped", "unavailable")))
                self.cancel(left)
            self._thread.join()

    def _loop(self) -> None:
        while (batch := self._next()) is not None:
            started = time.monotonic()
            answers = self._run(batch)
            self.metrics.batch(batch, time.monotonic() - started, started)
            for request, answer in answers:
                request.answer(answer)

    def _next(self) -> Batch | None:
        """The next batch, which is waited for; None when the server stops and nothing is left."""
        with self._changed:
            while (batch := self._scheduler.schedule()) is None:
                if self._is_draining:
                    return None
                self._changed.wait()
            return batch

    def _run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """The answers of a batch. Nothing runs twice: where the model fails, all of the batch are told."""
        answers = list[tuple[Request, Answer]]()
        with self.base.passing, ExitStack() as entered:
            try:
                rows, errors = self.base.enter([request.version for request in batch.requests], entered)
                answers += [(one, Answer(error=errors[one.version])) for one in batch.requests if one.version in errors]
                if rows is None:
                    return answers
                batch = replace(batch, requests=[one for one in batch.requests if one.version not in errors])
                return answers + self._encoder.run(batch, rows)
            except Exception:
                # A server goes on; whoever asked is told, and the log has the traceback.
                _log.exception("a batch of %s failed", batch.kind)
                return answers + [(request, Answer(error=model_failed())) for request in batch.requests]
