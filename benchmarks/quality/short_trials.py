"""Which rate do short trials choose, and what is lost with it in the whole run? Trials of the second grid, cut short.

Run from the repository's root: python -m benchmarks.quality.short_trials
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks.quality.grid import FILE, Grid, Run, read_grid
from benchmarks.quality.processes import pool_of, rows_of
from benchmarks.quality.results import FOLDER, read_rows, write_rows
from benchmarks.quality.running import carry_out
from benchmarks.quality.summary import Result
from benchmarks.quality.tuning import loss_of, trials
from dvora.training import find_rate
from dvora.training.rate_search import shortest_run

FILE_OF_ROWS = FOLDER / "short_trials.json"
STEPS = (20, 33, 50)
"""Of a trial; the whole runs have 500."""
ARMS = ("structured_r64", "lora_r1", "lora_r8", "vera_r256")
TASKS = ("countries", "webster_fields", "code_languages", "wordnet_topics", "movie_ratings")
USUAL = ("three times too low", "right", "three times too high")
"""What the rate that a search begins with is: the lowest of an arm's three, the middle one, the highest."""
MOST = 1.0
"""A whole run that ends above the frozen model's loss counts as one that gained nothing."""


def main() -> None:
    """Carry out the trials that are missing."""
    grid = read_grid(FILE.parent / "equal_bytes.yaml")
    rows = read_rows(FILE_OF_ROWS)
    with pool_of(2) as pool:
        found = rows_of(pool, partial(carry_out, grid), lambda: _missing(grid, rows), 2, inf)
        for row in track(found, "Short trials", total=len(_missing(grid, rows))):
            rows[row["key"]] = row
            write_rows(list(rows.values()), FILE_OF_ROWS)


def lines(rows: Iterable[Mapping[str, Any]], whole: Result) -> list[str]:
    """The table: what is lost of what tuning gains, with the usual rate and with the one that `find_rate` finds.

    Args:
        rows: short trials.
        whole: rows of whole trials at the same rates.
    """
    tried: dict[int, dict[tuple[str, str], dict[float, float]]] = {steps: {} for steps in STEPS}
    for row in rows:
        losses = tried[row["steps"]].setdefault((row["task"], row["arm"]), {})
        losses[row["rates"]["adapter"]] = loss_of(row)
    usual = {case: sorted(losses) for case, losses in tried[STEPS[0]].items()}
    table = [f"| the usual rate is | {' | '.join(USUAL)} |", "|---" * (len(USUAL) + 1) + "|"]
    table.append(_row("no search", usual, whole))
    for steps, cases in tried.items():
        found = {case: [_chosen(losses, rate) for rate in sorted(losses)] for case, losses in cases.items()}
        table.append(_row(f"three trials of {steps} steps", found, whole))
    return table


def _missing(grid: Grid, rows: Mapping[str, Any]) -> list[Run]:
    whole = [run for task in TASKS for arm in ARMS for run in trials(grid, task, arm, {})]
    wanted = [replace(run, steps=steps) for steps in STEPS for run in whole]
    return [run for run in wanted if run.key not in rows]


def _row(label: str, rates: Mapping[tuple[str, str], Sequence[float]], whole: Result) -> str:
    """The mean of what is lost, by the rates of each task and arm, one for each of `USUAL`."""
    shares = {case: whole.lost(*case) for case in rates}
    lost = [[min(shares[case][each[place]], MOST) for case, each in rates.items()] for place in range(len(USUAL))]
    return f"| {label} | {' | '.join(f'{float(np.mean(each)):.1%}' for each in lost)} |"


def _chosen(losses: Mapping[float, float], usual: float) -> float:
    """The rate that a search finds from the usual one; those that were not tried count as diverged."""

    def loss(rate: float, steps: int) -> float:
        return losses.get(_tried(losses, rate), inf)

    return _tried(losses, find_rate(loss, shortest_run(), center=usual).rate)


def _tried(rates: Iterable[float], rate: float) -> float:
    """The rate that was tried in place of one that differs from it by rounding."""
    return next((each for each in rates if abs(each / rate - 1) < 0.1), rate)


if __name__ == "__main__":
    main()
