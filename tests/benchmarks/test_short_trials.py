"""What short trials cost the whole run, on losses of known outcome."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.quality.short_trials import GROUPS, STEPS, lines
from benchmarks.quality.summary import Result
from tests.benchmarks.quality_rows import final, right, trial

RATES = (0.007, 0.02, 0.06)
START = 2.0


def table(shortest: Mapping[float, float]) -> list[list[str]]:
    """The cells where whole runs end at 1.1, 1.0 and 3.0, and so do trials, but for the shortest ones."""
    whole = dict(zip(RATES, (1.1, 1.0, 3.0), strict=True))
    finals: list[Any] = []
    short = []
    for task, arm in [case for group in GROUPS for case in group.cases]:
        finals.append(final(task, "frozen", 0, right(5), steps=0, validation={"loss": START, "score": 0.1}))
        finals += [trial(task, arm, *each) for each in whole.items()]
        for steps in STEPS:
            losses = shortest if steps == STEPS[0] else whole
            short += [{**trial(task, arm, *each), "steps": steps} for each in losses.items()]
    results = {group.grid: Result(tuple(finals)) for group in GROUPS}
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines(short, results)]


def test_trials_that_tell_rates_apart_lose_nothing() -> None:
    rows = table({0.007: 1.5, 0.02: 1.4, 0.06: 1.9})
    assert rows[0][2:] == ["the lowest of three", "the middle one", "the highest"]
    for place, group in enumerate(GROUPS):
        usual, *found = rows[2 + place * (1 + len(STEPS)) :][: 1 + len(STEPS)]
        assert usual == [group.label, "no search", "10.0%", "0.0%", "100.0%"]
        assert [row[2:] for row in found] == [["0.0%"] * 3] * len(STEPS)


@pytest.mark.parametrize(("highest", "lost"), [(1.395, "0.0%"), (1.0, "100.0%")])
def test_trials_that_prefer_a_rate_that_is_too_high_lose_what_the_run_loses(highest: float, lost: str) -> None:
    """Unless what they prefer is hardly better."""
    assert table({0.007: 1.5, 0.02: 1.4, 0.06: highest})[3][3] == lost
