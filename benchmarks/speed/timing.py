"""Interleaved timing: every round runs every step once, and times are compared as ratios within a round.

A change of the machine's speed during a run then affects both sides of a ratio alike.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

Step = Callable[[], object]


class Spread(NamedTuple):
    """Median and quartiles."""

    low: float
    median: float
    high: float


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    warm_ups: int = 1,
    at_least: float = 0.02,
    clock: Callable[[], float] = perf_counter,
) -> tuple[dict[str, list[float]], int]:
    """Seconds of every step in every round; all are called equally often, so that steps of training stay together.

    Args:
        steps: what is timed, by name. The first is the reference for `at_least`.
        rounds: how many are kept.
        warm_ups: rounds before them that are thrown away, one at least.
        at_least: seconds that the first step should take in a round, by the last warm-up; every step is repeated as
            often as that needs.
        clock: `time.process_time` for steps of one thread, which other processes then disturb less.

    Returns:
        Seconds of one step by name, and how often a step was repeated in a round.
    """
    order, seconds = list(steps), {name: list[float]() for name in steps}
    assert warm_ups > 0, "the last warm-up says how often a step is repeated"
    for _ in range(warm_ups):
        warming = [_timed(steps[name], 1, clock) for name in order]
    repeats = max(1, round(at_least / max(warming[0], 1e-9)))
    for _ in range(rounds):
        for name in order:
            seconds[name].append(_timed(steps[name], repeats, clock))
        # Back and forth, so that no step always follows the same one.
        order.reverse()
    return seconds, repeats


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The ratio of every round."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; a single value is all three."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def _timed(step: Step, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        step()
    return (clock() - start) / repeats
