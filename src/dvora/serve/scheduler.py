"""What runs next: queues of clients take turns by what they have cost, and what is cheap to run beside comes along.

A queue's time is what it has cost, in padded tokens, and the queue with the smallest time is next. Who was idle has
saved up nothing, and owes no more than others who wait. So a flood in one queue lets a request of another one wait for
the batch that runs, and for one more at most.

A batch is padded to its longest text, so short and long ones run apart where the padding would cost more than another
pass. It is bounded by its padded tokens, its rows, and the slots of the bank.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace, nsmallest
from itertools import chain, islice, zip_longest

from .requests import RefusedError, Request, Work
from .settings import Limits

PASS_ON_CPU, PASS_ON_ACCELERATOR = 64, 2048
"""Padded tokens that take about as long as what every pass takes: of small models; only the first was measured."""


@dataclass(frozen=True)
class Batch:
    """What runs at once."""

    kind: Work
    requests: Sequence[Request]


@dataclass(eq=False)
class _Queue:
    """The requests of one client that wait."""

    requests: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    """The oldest first."""
    time: float = 0.0


class Scheduler:
    """The requests that wait, by what padded tokens cost as much as another pass."""

    def __init__(self, limits: Limits, pass_tokens: int = PASS_ON_CPU) -> None:
        self.limits, self.pass_tokens = limits, pass_tokens
        self.waiting = 0
        """How many requests wait."""
        self._queues: dict[str, _Queue] = {}
        """Those in which somebody waits by when they began to."""
        self._time = 0.0
        """Of the queue whose turn was last, before its batch."""

    def add(self, requests: Sequence[Request]) -> list[Request]:
        """Let requests wait, all or none, and give those of the longest queues that have to go for them.

        It is 429 if too many wait, and no queue is longer.
        """
        displaced = self._displaced(requests)
        self.remove(displaced)
        self._join(requests)
        return displaced

    def remove(self, requests: Sequence[Request]) -> None:
        """Let those of the requests that wait do so no longer."""
        for request in requests:
            queue = self._queues.get(request.queue)
            if queue is not None and request in queue.requests:
                del queue.requests[request]
                self.waiting -= 1

    def overloaded(self, request: Request) -> RefusedError:
        """What is told to those for whom there is no room; it tells nothing of other queues."""
        waiting = len(self._queues[request.queue].requests) if request.queue in self._queues else 0
        message = f"{waiting} requests of this key or adapter wait, and no more may now; try again in a second"
        return RefusedError(429, message, "overloaded", {"Retry-After": "1"})

    def all_waiting(self) -> Iterator[Request]:
        """The requests that wait."""
        return chain.from_iterable(queue.requests for queue in self._queues.values())

    def schedule(self) -> Batch | None:
        """The next batch, of requests that somebody still waits for; None if there are none.

        It has the oldest request of the queue whose turn it is, and others that are cheap to run beside it.
        """
        if not (turns := self._turns()):
            return None
        first = next(iter(turns[0].requests))
        requests = self._with(first, turns)
        self.remove(requests)
        cost = max(request.length for request in requests) + self.pass_tokens / len(requests)
        for request in requests:
            self._queues[request.queue].time += cost
        return Batch(first.work, requests)

    def _turns(self) -> list[_Queue]:
        """The next queues in their order, as many as there could be batches of."""
        now = time.monotonic()
        for queue in self._queues.values():
            while queue.requests and not (first := next(iter(queue.requests))).is_wanted(now):
                self.remove([first])
        waiting = [queue for queue in self._queues.values() if queue.requests]
        turns = nsmallest(2 * self.limits.batch_rows, waiting, key=lambda queue: queue.time)
        self._time = max([self._time, *(queue.time for queue in turns[:1])])
        return turns

    def _join(self, requests: Sequence[Request]) -> None:
        """Let requests wait in their queues, as the last ones."""
        if len(self._queues) > 2 * self.limits.queue:
            self._queues = {name: queue for name, queue in self._queues.items() if queue.requests}
        latest = max((queue.time for queue in self._queues.values() if queue.requests), default=self._time)
        for request in requests:
            queue = self._queues.setdefault(request.queue, _Queue())
            if not queue.requests:
                # Behind those that have waited at the same time before.
                self._queues[request.queue] = self._queues.pop(request.queue)
                queue.time = max(self._time, min(queue.time, latest))
            queue.requests[request] = None
            self.waiting += 1

    def _displaced(self, requests: Sequence[Request]) -> list[Request]:
        """The youngest of the longest queues, without whom others fit; of queues that stay as long as the others'."""
        if self.waiting + len(requests) <= self.limits.queue:
            return []
        joining = Counter(request.queue for request in requests)
        sizes = {name: len(queue.requests) for name, queue in self._queues.items() if queue.requests}
        joined = max(sizes.get(name, 0) + more for name, more in joining.items())
        longest = [(-size, name) for name, size in sizes.items()]
        heapify(longest)
        going = Counter[str]()
        for _ in range(self.waiting + len(requests) - self.limits.queue):
            if not longest or -longest[0][0] <= joined:
                raise self.overloaded(requests[0])
            size, name = longest[0]
            heapreplace(longest, (size + 1, name))
            going[name] += 1
        return [request for name in going for request in islice(reversed(self._queues[name].requests), going[name])]

    def _with(self, first: Request, turns: Sequence[_Queue]) -> list[Request]:
        """A request, and of the next ones of all queues those that are cheap to run with it, as many as fit."""
        window, now = 2 * self.limits.batch_rows, time.monotonic()
        of_queues = [
            (r for r in islice(queue.requests, window) if r.work == first.work and r.is_wanted(now)) for queue in turns
        ]
        next_ones = (request for level in zip_longest(*of_queues) for request in level if request not in (None, first))
        near = _cheap_together([first, *islice(next_ones, window - 1)], self.limits, self.pass_tokens)
        while len({request.version for request in near} - {None}) > self.limits.slots:
            near.pop()
        return near


def _cheap_together(requests: Sequence[Request], limits: Limits, pass_tokens: int) -> list[Request]:
    """Of requests in their order the first, and those with which it runs if all of them are to cost least.

    Sorted by length they are cut into batches, of which each costs its padded tokens and a pass.
    """
    longest_first = sorted(requests, key=lambda request: -request.length)
    costs, starts = [0], list[int]()
    for end in range(1, len(requests) + 1):
        batches = []
        for start in range(max(0, end - limits.batch_rows), end):
            padded = longest_first[start].length * (end - start)
            if padded <= limits.batch_tokens or end - start == 1:
                batches.append((costs[start] + padded + pass_tokens, start))
        cost, start = min(batches)
        costs.append(cost)
        starts.append(start)
    end = len(requests)
    while requests[0] not in (batch := longest_first[starts[end - 1] : end]):
        end = starts[end - 1]
    return [request for request in requests if request in batch]
