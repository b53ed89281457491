"""The engine: one thread that schedules, runs and answers, batch after batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from .base import Base
from .decoder import Decoder
from .encoder import Encoder
from .metrics import Metrics
from .requests import Answer, RefusedError, Request, model_failed
from .scheduler import PASS_ON_ACCELERATOR, PASS_ON_CPU, Batch, Scheduler
from .settings import Limits

_log = logging.getLogger("dvora.serve")


class Engine:
    """Serves requests over one base until it is closed.

    Args:
        base: with its bank; used by the engine's thread only from now on.
        limits: of the server.
        longest: tokens of a text, its continuation among them.
        metrics: to count in.
    """

    def __init__(self, base: Base, limits: Limits, longest: int, metrics: Metrics) -> None:
        self.base, self.metrics = base, metrics
        self._scheduler = Scheduler(limits, PASS_ON_CPU if base.model.device.type == "cpu" else PASS_ON_ACCELERATOR)
        self._decoder = Decoder(base, limits, longest) if base.generates else None
        self._runner = self._decoder or Encoder(base)
        self._changed = threading.Condition()
        self._is_draining = False
        self._thread = threading.Thread(target=self._loop, name="dvora-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their batch: all of them, or none.

        Raises:
            RefusedError: 429, too many wait; 503, the server is stopping.
        """
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

    def waiting(self) -> int:
        """How many requests wait."""
        return self._scheduler.waiting

    def adapters(self) -> tuple[set[str], set[str]]:
        """What the bank calls the adapters of texts that are generated, and of requests that wait."""
        with self._changed:
            running = {request.adapter for request in self._scheduler.running}
            waiting = {request.adapter for request in self._scheduler.all_waiting()}
        return {name for name in running if name}, {name for name in waiting if name}

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
                left = [*self._scheduler.all_waiting(), *self._scheduler.running]
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
        with self.base.passing:
            self.base.leave()

    def _next(self) -> Batch | None:
        """The next batch, which is waited for; None when the server stops and nothing is left."""
        with self._changed:
            batch = self._schedule()
        if batch is None:
            # Idle: nobody needs the slots of the last batch. Not under the lock that `submit` takes: a load may have
            # this one.
            with self.base.passing:
                self.base.leave()
        with self._changed:
            while (batch := batch or self._schedule()) is None:
                if self._is_draining:
                    return None
                self._changed.wait()
            return batch

    def _schedule(self) -> Batch | None:
        if self._decoder is not None:
            now = time.monotonic()
            self._decoder.drop([request for request in self._decoder.running if not request.is_wanted(now)])
            self._scheduler.running = [*self._decoder.running]
        batch = self._scheduler.schedule()
        if batch is not None:
            self._runner.drop(batch.paused)
        return batch

    def _run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """The answers of a batch. Nothing runs twice: where the model fails, all of the batch are told."""
        runner = self._runner
        with self.base.passing:
            unreadable = self.base.unreadable([request.adapter for request in batch.requests])
            failed = [request for request in batch.requests if request.adapter in unreadable]
            answers = [(request, Answer(error=unreadable[request.adapter])) for request in failed]
            batch = replace(batch, requests=[request for request in batch.requests if request not in failed])
            try:
                runner.drop(failed)
                return answers + (runner.run(batch) if batch.requests else [])
            except Exception:
                # A server goes on; whoever asked is told, and the log has the traceback.
                _log.exception("a batch of %s failed", batch.kind)
                self.base.leave()
                runner.drop(batch.requests)
                return answers + [(request, Answer(error=model_failed())) for request in batch.requests]
