"""Requests that come one after the other, each for one adapter: who asks for what, when, and how long it waits.

Nothing here knows a model: `serve` answers a batch, and a clock tells the time, so that a test can be its own clock.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np

Serve = Callable[[Sequence[int]], object]
"""Answers a batch, given the adapters of its rows."""


class Clock(Protocol):
    """Seconds since some moment, and a way to wait."""

    def now(self) -> float: ...

    def wait_until(self, moment: float) -> None: ...


class WallClock:
    """The machine's."""

    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        time.sleep(max(0.0, moment - self.now()))


class Answered(NamedTuple):
    """What became of a stream of requests."""

    latencies: list[float]
    """Seconds from a request to its answer."""
    seconds: float
    """From the first request to the last answer."""
    refused: int = 0
    """Requests that found too many before them."""


def zipf(count: int, requests: int, exponent: float, seed: int) -> list[int]:
    """Adapters that requests ask for: number k with a probability in proportion to (k + 1) ** -exponent.

    Args:
        count: of adapters.
        requests: how many.
        exponent: 0 asks for all alike, larger ones more often for the first.
        seed: equal ones give equal requests.
    """
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    found: list[int] = np.random.default_rng(seed).choice(count, requests, p=weights / weights.sum()).tolist()
    return found


def poisson(requests: int, per_second: float, seed: int) -> list[float]:
    """Moments at which requests come that know nothing of one another."""
    found: list[float] = np.random.default_rng([seed, 1]).exponential(1 / per_second, requests).cumsum().tolist()
    return found


def closed_loop(adapters: Sequence[int], clients: int, batch: int, serve: Serve, clock: Clock) -> Answered:
    """Clients that send their next request when they have an answer.

    Args:
        adapters: what is asked for, in this order.
        clients: how many requests are under way, but for the end.
        batch: rows at most.
        serve: answers.
        clock: tells the time.
    """
    start, latencies = clock.now(), list[float]()
    coming = iter(adapters)
    waiting = deque((adapter, start) for adapter in islice(coming, clients))
    while waiting:
        taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
        serve([adapter for adapter, _ in taken])
        now = clock.now()
        latencies += [now - asked for _, asked in taken]
        waiting.extend((adapter, now) for adapter in islice(coming, len(taken)))
    return Answered(latencies, clock.now() - start)


def open_loop(
    adapters: Sequence[int], moments: Sequence[float], at_most: int, batch: int, serve: Serve, clock: Clock
) -> Answered:
    """Requests that come whether or not others are answered.

    Args:
        adapters: what is asked for.
        moments: when, in seconds from now, ascending.
        at_most: requests that may wait; who finds that many is refused.
        batch: rows at most.
        serve: answers.
        clock: tells the time.
    """
    start, latencies, refused = clock.now(), list[float](), 0
    coming = deque((adapter, start + moment) for adapter, moment in zip(adapters, moments, strict=True))
    waiting = deque[tuple[int, float]]()
    while coming or waiting:
        while coming and coming[0][1] <= clock.now():
            request = coming.popleft()
            if len(waiting) < at_most:
                waiting.append(request)
            else:
                refused += 1
        if waiting:
            taken = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            serve([adapter for adapter, _ in taken])
            latencies += [clock.now() - asked for _, asked in taken]
        elif coming:
            clock.wait_until(coming[0][1])
    return Answered(latencies, clock.now() - start, refused)
