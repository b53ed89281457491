"""Which trials a method gets, and what they chose: the same number for each method, evaluated on validation only."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.quality.grid import Arm, Grid, Rates, Run

Rows = Mapping[str, dict[str, Any]]
"""Finished rows by the key of their run."""


def trials(grid: Grid, task: str, name: str, rows: Rows) -> list[Run]:
    """The trials of an arm that are determined by the finished ones, which are included.

    Later trials depend on the results of these.
    """
    if grid.arms[name].rate_by == "centre":
        return []
    runs = _first(grid, task, name)
    for following in grid.tuning["later_trials"]:
        if not _finished(runs, rows):
            break
        runs = runs + _LATER[following](grid, name, runs, rows)
    return runs


def chosen(grid: Grid, task: str, name: str, rows: Rows) -> Rates | None:
    """The tuned rates of an arm; None while trials are missing."""
    source = grid.arms[name].tuned_as or name
    where = grid.tasks[task].tuned_on or task
    if (where, source) != (task, name):
        rates = chosen(grid, where, source, rows)
        return rates and _fitted(grid.arms[name], _scaled(rates, grid.arms[name].rate_factor))
    if grid.arms[name].rate_by == "centre":
        return _at_rate(grid, task, name, grid.arms[name].centre)
    runs = trials(grid, task, name, rows)
    return _best(runs, rows).rates if len(runs) == trial_count(grid, task, name) and _finished(runs, rows) else None


def trial_count(grid: Grid, task: str, name: str) -> int:
    """How many trials a tuned arm gets on a task."""
    if grid.arms[name].rate_by == "centre":
        return 0
    later = {
        "one_more": 1,
        "two_more": 2,
        "magnitude": 2,
        "head": len(grid.tuning["head_factors"][grid.tasks[task].model]),
    }
    return len(grid.arms[name].rates) + sum(later[following] for following in grid.tuning["later_trials"])


def loss_of(row: Mapping[str, Any]) -> float:
    """Validation loss of a row; a run that failed or diverged has the worst."""
    loss = row["validation"]["loss"] if row.get("validation") else None
    return float("inf") if loss is None else loss


def one_more(losses: Mapping[float, float], between: float) -> float:
    """The rate to try next: beyond the best one if it is at an edge, else between it and the better of its neighbours.

    Args:
        losses: by the rates that were tried.
        between: the factor from a rate to one half way to the next.
    """
    order = sorted(losses)
    place = order.index(min(losses, key=losses.__getitem__))
    if place in (0, len(order) - 1):
        return order[place] * (between**2 if place else between**-2)
    below, above = losses[order[place - 1]], losses[order[place + 1]]
    return order[place] * (1 / between if below < above else between)


def _first(grid: Grid, task: str, name: str) -> list[Run]:
    every = [_at_rate(grid, task, name, rate) for rate in grid.arms[name].rates]
    return [Run(task, name, "trial", grid.training["tuning_seed"], grid.tasks[task].steps, rates) for rates in every]


def _at_rate(grid: Grid, task: str, name: str, rate: float) -> Rates:
    """An adapter's rate with those of magnitude and head beside it."""
    arm, tuning, model = grid.arms[name], grid.tuning, grid.tasks[task].model
    middle = sorted(arm.rates)[len(arm.rates) // 2]
    start = Rates(middle, tuning["magnitude_rate"][model], tuning["head_rate"][model])
    return _fitted(arm, _scaled(start, rate / middle))


def _two_more(grid: Grid, name: str, runs: list[Run], rows: Rows) -> list[Run]:
    """Two rates: beyond the best one if it is at an edge, else between it and its neighbours."""
    best, between = _best(runs, rows), grid.tuning["between"]
    factors = {0: (1 / between**2, 1 / between), len(runs) - 1: (between, between**2)}
    return _at(grid, name, best, factors.get(runs.index(best), (1 / between, between)))


def _one_more(grid: Grid, name: str, runs: list[Run], rows: Rows) -> list[Run]:
    """One rate, beyond the best or beside it."""
    losses = {run.rates.adapter: loss_of(rows[run.key]) for run in runs if run.rates}
    best, rate = _best(runs, rows), one_more(losses, grid.tuning["between"])
    assert best.rates is not None
    return _at(grid, name, best, (rate / best.rates.adapter,))


def _magnitude(grid: Grid, name: str, runs: list[Run], rows: Rows) -> list[Run]:
    """Two rates of the magnitude, or, where it has none of its own, two rates close to the best."""
    best, around = _best(runs, rows), grid.tuning["around"]
    assert best.rates is not None
    magnitude = best.rates.magnitude
    if magnitude is None:
        return _at(grid, name, best, (1 / around, around))
    factors = grid.tuning["magnitude_factors"]
    return [replace(best, rates=replace(best.rates, magnitude=magnitude * factor)) for factor in factors]


def _head(grid: Grid, name: str, runs: list[Run], rows: Rows) -> list[Run]:
    """Other rates of the head, where they matter."""
    best = _best(runs, rows)
    assert best.rates is not None
    head = best.rates.head
    factors = grid.tuning["head_factors"][grid.tasks[best.task].model]
    return [replace(best, rates=replace(best.rates, head=head * factor)) for factor in factors if head is not None]


def _at(grid: Grid, name: str, run: Run, factors: tuple[float, ...]) -> list[Run]:
    assert run.rates is not None
    every = [_scaled(run.rates, factor) for factor in factors]
    return [replace(run, rates=_fitted(grid.arms[name], rates)) for rates in every]


def _scaled(rates: Rates, factor: float) -> Rates:
    magnitude = None if rates.magnitude is None else rates.magnitude * factor
    return replace(rates, adapter=rates.adapter * factor, magnitude=magnitude)


def _fitted(arm: Arm, rates: Rates) -> Rates:
    """The rates as the arm can use them."""
    if arm.one_rate:
        return replace(rates, magnitude=rates.adapter)
    return rates if arm.magnitude else replace(rates, magnitude=None)


def _finished(runs: list[Run], rows: Rows) -> bool:
    return all(run.key in rows for run in runs)


def _best(runs: list[Run], rows: Rows) -> Run:
    return min(runs, key=lambda run: loss_of(rows[run.key]))


_LATER = {"one_more": _one_more, "two_more": _two_more, "magnitude": _magnitude, "head": _head}
"""By the names under `later_trials` in a grid: the trials that follow from the finished ones."""
