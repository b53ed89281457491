"""What runs next: the waiting requests in their order, as many as a batch has room for; texts that are generated first.

A batch is bounded by its padded tokens (rows times the longest), its rows, and the slots of the bank. After every batch
of new prompts the running texts get a step, so that neither waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .requests import RefusedError, Request

Kind = Literal["classify", "embed", "prefill", "decode"]


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        batch_tokens: padded tokens of a batch.
        batch_rows: rows of a batch, and texts that are generated at a time.
        queue: requests that wait; more are refused.
        slots: different adapters of a batch, and of the texts that are generated.
        cache_tokens: of the texts that are generated, as if all were as long as the longest.
    """

    batch_tokens: int = 8192
    batch_rows: int = 32
    queue: int = 1024
    slots: int = 256
    cache_tokens: int = 32768


@dataclass(frozen=True)
class Batch:
    """What runs at once."""

    kind: Kind
    requests: Sequence[Request]


@dataclass
class Scheduler:
    """The requests that wait and those that run; used by one thread at a time.

    Args:
        limits: of the server.
    """

    limits: Limits
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    """Texts that are generated, by their rows in the cache."""
    _prompts_were_last: bool = False

    def add(self, requests: Sequence[Request]) -> None:
        """Let requests wait: all of them, or none.

        Raises:
            RefusedError: 429, the queue is full.
        """
        if len(self.waiting) + len(requests) > self.limits.queue:
            raise RefusedError(
                429,
                f"{len(self.waiting)} requests wait, and at most {self.limits.queue} may; try again in a second",
                "overloaded",
                {"Retry-After": "1"},
            )
        self.waiting.extend(requests)

    def schedule(self) -> Batch | None:
        """The next batch, of requests that somebody still waits for; None if there are none."""
        self.waiting = deque(request for request in self.waiting if not request.is_cancelled)
        new = [] if self.running and self._prompts_were_last else self._next()
        if new:
            for request in new:
                self.waiting.remove(request)
            work = new[0].work
            self._prompts_were_last = work == "generate"
            return Batch("prefill" if work == "generate" else work, new)
        self._prompts_were_last = False
        return Batch("decode", list(self.running)) if self.running else None

    def _next(self) -> list[Request]:
        """Of the waiting requests those that do the first one's work, as many as fit."""
        new: list[Request] = []
        longest, adapters = 0, {request.adapter for request in self.running}
        room = max((request.room for request in self.running), default=0)
        for request in self.waiting:
            if request.work != self.waiting[0].work:
                continue
            rows, of_texts = len(new) + 1, request.work == "generate"
            longest, room = max(longest, len(request.tokens)), max(room, request.room)
            named = {*adapters, request.adapter} - {None}
            if of_texts:
                rows += len(self.running)
            over_budget = new and longest * (len(new) + 1) > self.limits.batch_tokens
            no_cache = of_texts and rows > 1 and rows * room > self.limits.cache_tokens
            if over_budget or no_cache or rows > self.limits.batch_rows or len(named) > self.limits.slots:
                break
            new.append(request)
            adapters.add(request.adapter)
        return new
