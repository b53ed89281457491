"""What runs next: the request that has waited longest, with others for which it is cheap to run beside it.

A batch is padded to its longest text, so short and long ones run apart where the padding would cost more than another
pass. It is bounded by its padded tokens, its rows, and the slots of the bank. After every batch of new prompts the
texts that are generated get a step, so that neither waits for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from .requests import RefusedError, Request

Kind = Literal["classify", "embed", "prefill", "decode"]

PASS_ON_CPU, PASS_ON_ACCELERATOR = 64, 2048
"""Padded tokens that take about as long as what every pass takes: of small models; only the first was measured."""


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
        pass_tokens: padded tokens that cost as much as another pass.
    """

    limits: Limits
    pass_tokens: int = PASS_ON_CPU
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
        """The first waiting request, and of those that are cheap to run with it as many as fit, in their order."""
        if not self.waiting:
            return []
        same = (request for request in self.waiting if request.work == self.waiting[0].work)
        near = _cheap_together(list(islice(same, 2 * self.limits.batch_rows)), self.limits, self.pass_tokens)
        # Texts hold their row, their adapter and their cache until they end.
        held = self.running if self.waiting[0].work == "generate" else []
        adapters = {request.adapter for request in self.running}
        room = max((request.room for request in held), default=0)
        new: list[Request] = []
        for request in near:
            rows, room = len(held) + len(new) + 1, max(room, request.room)
            adapters.add(request.adapter)
            no_cache = request.work == "generate" and rows > 1 and rows * room > self.limits.cache_tokens
            if no_cache or rows > self.limits.batch_rows or len(adapters - {None}) > self.limits.slots:
                break
            new.append(request)
        return new


def _cheap_together(requests: Sequence[Request], limits: Limits, pass_tokens: int) -> list[Request]:
    """Of requests in their order the first, and those with which it runs if all of them are to cost least.

    Sorted by length they are cut into batches, of which each costs its padded tokens and a pass.
    """
    longest_first = sorted(requests, key=lambda request: -len(request.tokens))
    costs, starts = [0], list[int]()
    for end in range(1, len(requests) + 1):
        batches = []
        for start in range(max(0, end - limits.batch_rows), end):
            padded = len(longest_first[start].tokens) * (end - start)
            if padded <= limits.batch_tokens or end - start == 1:
                batches.append((costs[start] + padded + pass_tokens, start))
        cost, start = min(batches)
        costs.append(cost)
        starts.append(start)
    end = len(requests)
    while requests[0] not in (batch := longest_first[starts[end - 1] : end]):
        end = starts[end - 1]
    return [request for request in requests if request in batch]
