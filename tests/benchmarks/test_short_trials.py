"""What short trials cost the whole run, on losses of known outcome."""

from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks.quality.short_trials import GROUPS, MINILM, OTHERS, STEPS, lines, other_models
from benchmarks.quality.summary import Result
from tests.benchmarks.quality_rows import final, right, trial

RATES = (0.007, 0.02, 0.06)
START = 2.0


def rows_of(shortest: Mapping[float, float]) -> tuple[list[Any], Result]:
    """Whole runs that end at 1.1, 1.0 and 3.0, and trials that do, too, but for the shortest ones."""
    whole = dict(zip(RATES, (1.1, 1.0, 3.0), strict=True))
    finals: list[Any] = []
    short = []
    for task, arm in [case for group in GROUPS for case in group.cases]:
        finals.append(final(task, "frozen", 0, right(5), steps=0, validation={"loss": START, "score": 0.1}))
        finals += [trial(task, arm, *each) for each in whole.items()]
        for steps in STEPS:
            losses = shortest if steps == STEPS[0] else whole
            short += [{**trial(task, arm, *each), "steps": steps} for each in losses.items()]
    return short, Result(tuple(finals))


def cells(table: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_trials_that_tell_rates_apart_lose_nothing() -> None:
    rows = cells(lines(*rows_of({0.007: 1.5, 0.02: 1.4, 0.06: 1.9})))
    assert rows[0] == ["the usual rate is", "three times too low", "right", "three times too high"]
    assert rows[2] == ["no search", "10.0%", "0.0%", "100.0%"]
    assert [row[1:] for row in rows[3:]] == [["0.0%"] * 3] * len(STEPS)


@pytest.mark.parametrize(("highest", "lost"), [(1.395, "0.0%"), (1.0, "100.0%")])
def test_trials_that_prefer_a_rate_that_is_too_high_lose_what_the_run_loses(highest: float, lost: str) -> None:
    """Unless what they prefer is hardly better."""
    assert cells(lines(*rows_of({0.007: 1.5, 0.02: 1.4, 0.06: highest})))[3][2] == lost


@pytest.mark.parametrize(("highest", "found"), [(1.395, "0.02 (1.000)"), (1.0, "0.06 (3.000)")])
def test_other_models_have_the_rates_that_are_found(highest: float, found: str) -> None:
    short, whole = rows_of({0.007: 1.5, 0.02: 1.4, 0.06: highest})
    rows = cells(other_models(short, {group.grid: whole for group in GROUPS}))[2:]
    assert [row[:2] for row in rows] == [[group.label, label] for group in OTHERS for label in group.arms]
    right_one = "0.02 (1.000)"
    assert all(row[2:] == [right_one, right_one, found, right_one, right_one] for row in rows)
    assert MINILM.label not in str(rows)
