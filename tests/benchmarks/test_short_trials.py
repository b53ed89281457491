"""What short trials cost the whole run, on losses of known outcome."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.quality.short_trials import ARMS, STEPS, TASKS, lines
from benchmarks.quality.summary import Result
from tests.benchmarks.quality_rows import final, right, trial

RATES = (0.007, 0.02, 0.06)
START = 2.0


def table(shortest: Mapping[float, float]) -> list[list[str]]:
    """The cells where whole runs end at 1.1, 1.0 and 3.0, and so do trials, but for the shortest ones."""
    whole = dict(zip(RATES, (1.1, 1.0, 3.0), strict=True))
    finals: list[Any] = [
        final(task, "frozen", 0, right(5), steps=0, validation={"loss": START, "score": 0.1}) for task in TASKS
    ]
    finals += [trial(task, arm, *each) for task in TASKS for arm in ARMS for each in whole.items()]
    short = [
        {**trial(task, arm, *each), "steps": steps}
        for task in TASKS
        for arm in ARMS
        for steps in STEPS
        for each in (shortest if steps == STEPS[0] else whole).items()
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines(short, Result(tuple(finals)))]


def test_trials_that_tell_rates_apart_lose_nothing() -> None:
    rows = table({0.007: 1.5, 0.02: 1.4, 0.06: 1.9})
    assert rows[0] == ["the usual rate is", "three times too low", "right", "three times too high"]
    assert rows[2] == ["no search", "10.0%", "0.0%", "100.0%"]
    assert [row[1:] for row in rows[3:]] == [["0.0%"] * 3] * len(STEPS)


@pytest.mark.parametrize(("highest", "lost"), [(1.395, "0.0%"), (1.0, "100.0%")])
def test_trials_that_prefer_a_rate_that_is_too_high_lose_what_the_run_loses(highest: float, lost: str) -> None:
    """Unless what they prefer is hardly better."""
    assert table({0.007: 1.5, 0.02: 1.4, 0.06: highest})[3][2] == lost
