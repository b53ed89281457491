"""Which rate do short trials choose, and what is lost with it in the whole run? Trials of both grids, cut short.

Run from the repository's root: python -m benchmarks.quality.short_trials
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
"""Of a trial; the whole runs have 500 on MiniLM, 200 on SmolLM2 and 150 on ViT-S/14."""
USUAL = ("three times too low", "right", "three times too high")
"""What the rate that a search begins with is: the lowest of an arm's three, the middle one, the highest."""
MOST = 1.0
"""A whole run that ends above the frozen model's loss counts as one that gained nothing."""


@dataclass(frozen=True)
class Group:
    """Tasks of one model, with the arms whose whole trials a grid has.

    Args:
        label: in the table.
        grid: the name of its file.
        tasks: of the grid.
        arms: of the grid, all with three rates to begin with, by how they are shown.
    """

    label: str
    grid: str
    tasks: tuple[str, ...]
    arms: Mapping[str, str]

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Every task with every arm."""
        return [(task, arm) for task in self.tasks for arm in self.arms.values()]


_ARMS = {"DVoRA r=64": "structured_r64", "LoRA r=1": "lora_r1", "LoRA r=8": "lora_r8", "VeRA r=256": "vera_r256"}
_CLASSES = ("countries", "webster_fields", "code_languages", "wordnet_topics", "movie_ratings")
MINILM = Group("MiniLM, five tasks", "equal_bytes", _CLASSES, _ARMS)
OTHERS = (
    Group("SmolLM2, cron expressions", "equal_bytes", ("cron_expressions",), _ARMS),
    Group(
        "ViT-S/14, Fashion-MNIST",
        "quality",
        ("fashion_mnist",),
        {"DVoRA r=256": "dvora_structured", "LoRA r=8": "lora_r8", "VeRA r=256": "vera"},
    ),
)
GROUPS = (MINILM, *OTHERS)


def main() -> None:
    """Carry out the trials that are missing."""
    grids = {group.grid: read_grid(FILE.parent / f"{group.grid}.yaml") for group in GROUPS}
    rows = read_rows(FILE_OF_ROWS)
    with pool_of(2) as pool:
        found = rows_of(pool, partial(_carry_out, grids), lambda: _missing(grids, rows), 2, inf)
        for row in track(found, "Short trials", total=len(_missing(grids, rows))):
            rows[row["key"]] = row
            write_rows(list(rows.values()), FILE_OF_ROWS)


def lines(rows: Iterable[Mapping[str, Any]], whole: Result) -> list[str]:
    """The table: what is lost of what tuning gains on MiniLM, with the usual rate and with the one of `find_rate`.

    Args:
        rows: short trials.
        whole: rows of whole trials at the same rates.
    """
    tried = _losses(rows)
    usual = {case: sorted(tried[STEPS[0]][case]) for case in MINILM.cases}
    table = [f"| the usual rate is | {' | '.join(USUAL)} |", "|---" * (len(USUAL) + 1) + "|"]
    table.append(_row("no search", usual, whole))
    for steps in STEPS:
        found = {case: [_chosen(tried[steps][case], rate) for rate in usual[case]] for case in MINILM.cases}
        table.append(_row(f"three trials of {steps} steps", found, whole))
    return table


def other_models(rows: Iterable[Mapping[str, Any]], whole: Mapping[str, Result]) -> list[str]:
    """The table: the rates that `find_rate` finds from the middle one of three, each with the loss of its whole run.

    Not as a share of what tuning gains: from an answer that was never seen to one that is right the loss falls so far
    that the share says nothing, and on the ViT an adapter gains next to nothing.

    Args:
        rows: short trials.
        whole: by a grid's name: rows of whole trials at the same rates.
    """
    tried = _losses(rows)
    found = " | ".join(f"of {steps} steps" for steps in STEPS)
    table = [f"| model | adapter | best of three rates | the middle one | three trials {found} |"]
    table.append("|---" * (len(STEPS) + 4) + "|")
    for group in OTHERS:
        for (task, arm), label in zip(group.cases, group.arms, strict=True):
            losses = dict(whole[group.grid].trials(task, arm))
            three = sorted(tried[STEPS[0]][task, arm])
            rates = [min(three, key=lambda rate: losses[_tried(losses, rate)]), three[1]]
            rates += [_chosen(tried[steps][task, arm], three[1]) for steps in STEPS]
            cells = [f"{rate:.2g} ({losses[_tried(losses, rate)]:.3f})" for rate in rates]
            table.append(f"| {' | '.join([group.label, label, *cells])} |")
    return table


def _losses(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[tuple[str, str], dict[float, float]]]:
    """Of short trials: by steps, task and arm, and the adapter's rate."""
    tried: dict[int, dict[tuple[str, str], dict[float, float]]] = {steps: {} for steps in STEPS}
    for row in rows:
        losses = tried[row["steps"]].setdefault((row["task"], row["arm"]), {})
        losses[row["rates"]["adapter"]] = loss_of(row)
    return tried


def _missing(grids: Mapping[str, Grid], rows: Mapping[str, Any]) -> list[Run]:
    whole = [run for group in GROUPS for case in group.cases for run in trials(grids[group.grid], *case, {})]
    wanted = [replace(run, steps=steps) for steps in STEPS for run in whole]
    return [run for run in wanted if run.key not in rows]


def _carry_out(grids: Mapping[str, Grid], run: Run) -> dict[str, Any]:
    grid = next(group.grid for group in GROUPS if (run.task, run.arm) in group.cases)
    return carry_out(grids[grid], run)


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
    """The rate that was tried in place of one near it: a grid's are 2.9 to 3.5 times apart, those of a search three."""
    return next((each for each in rates if abs(each / rate - 1) < 0.2), rate)


if __name__ == "__main__":
    main()
