"""Which runs follow from which results: as many trials for each method, and nothing chosen on test."""

from collections.abc import Callable
from typing import Any

from benchmarks.quality.grid import Run, read_grid
from benchmarks.results import file_of, read_rows

GRID = read_grid()
Rows = dict[str, dict[str, Any]]


def carried_out(name: str, loss: Callable[[Run], float | None]) -> Rows:
    rows: Rows = {}
    while waiting := [run for run in GRID.trials("countries", name, rows) if run.key not in rows]:
        rows |= {run.key: {"validation": {"loss": loss(run), "score": 0.5}} for run in waiting}
    return rows


def test_a_run_that_failed_or_diverged_is_not_chosen() -> None:
    def loss(run: Run) -> float | None:
        assert run.rates is not None
        return None if run.rates.adapter > 0.03 else 1.0

    best = GRID.chosen("countries", "vera_r256", carried_out("vera_r256", loss))
    assert best is not None
    assert best.adapter <= 0.03


def test_nothing_is_chosen_while_trials_are_missing() -> None:
    rows = carried_out("vera_r256", lambda _: 1.0)
    rows.pop(next(iter(rows)))
    assert GRID.chosen("countries", "vera_r256", rows) is None
    assert not [run for run in GRID.waiting(rows, ["countries"], ["vera_r256"]) if run.stage == "final"]


def test_the_committed_rows_are_those_of_the_grid() -> None:
    """What was tuned, chosen and trained is what this grid would tune, choose and train again."""
    rows = read_rows(file_of("equal_bytes"))
    keys = {run.key for run in GRID.waiting(rows, list(GRID.tasks), list(GRID.arms))}
    assert {key for key, each in rows.items() if each["stage"] != "alone"} <= keys
    assert {key.split()[0] for key in keys - rows.keys()} == {"cron_expressions"}
