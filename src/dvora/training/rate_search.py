"""A learning rate found by a few short trials, for any loop and any method: what they cost, and which rates they try.

The trials know nothing of models: a function trains a fresh copy at a rate, for some steps, and returns a loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, inf, isfinite
from typing import Any

from .optimizer_groups import LAMBDA_RATE

SHARE = 0.2
"""Of the run's steps, what all trials together take at most."""
FIRST, MOST = 3, 5
"""Trials around the centre, which are always made, and trials in all."""
LEAST_STEPS, ENOUGH_STEPS = 8, 50
"""Steps of a trial, below which there is none, and below which longer trials are worth more than a fourth one."""
SPACING = 3.0
"""Factor between neighbouring rates: the losses of short trials do not rank closer ones (benchmarks/LOG.md)."""
CLEARLY = 0.1
"""The centre stays unless a loss is lower by more than this share of the spread of all losses."""


@dataclass(frozen=True)
class RatePlan:
    """What a search for a learning rate costs.

    Args:
        trials: how many are made at most; 0: the run is too short for a search.
        steps: of each trial.
        run_steps: of the run that the rate is for.
    """

    trials: int
    steps: int
    run_steps: int

    @property
    def share(self) -> float:
        """The steps of all trials, in units of the run's."""
        return self.trials * self.steps / self.run_steps


@dataclass(frozen=True)
class RateTrial:
    """A trial that was made.

    Args:
        rate: the learning rate.
        loss: on validation rows, infinite if it diverged.
    """

    rate: float
    loss: float

    def to_dict(self) -> dict[str, float | None]:
        """For a record in JSON, which has no infinity: None in its place."""
        return {"rate": self.rate, "loss": self.loss if isfinite(self.loss) else None}


@dataclass(frozen=True)
class RateSearch:
    """What a search found.

    Args:
        rate: the learning rate for the run.
        steps: of each trial.
        trials: in the order in which they were made.
    """

    rate: float
    steps: int
    trials: tuple[RateTrial, ...]

    def to_dict(self) -> dict[str, Any]:
        """For a record in JSON: the rate, the steps of a trial, and the trials."""
        return {"rate": self.rate, "steps": self.steps, "trials": [trial.to_dict() for trial in self.trials]}


def rate_plan(steps: int, share: float = SHARE) -> RatePlan:
    """What `find_rate` will cost a run, known before anything is trained.

    Args:
        steps: of the run.
        share: of them, what all trials together may take.

    Returns:
        The trials and the steps of each; no trials if a run is so short that theirs would be fewer than eight steps.

    Raises:
        ValueError: `steps` or `share` is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected the number of steps of the run, at least 1")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected the share of the run's steps for trials, above 0 and up to 1")
    budget = int(share * steps)
    if budget < FIRST * LEAST_STEPS:
        return RatePlan(0, 0, steps)
    trials = min(MOST, max(FIRST, budget // ENOUGH_STEPS))
    return RatePlan(trials, budget // trials, steps)


def shortest_run(share: float = SHARE) -> int:
    """The fewest steps of a run that a search is made for."""
    return ceil(FIRST * LEAST_STEPS / share)


def find_rate(
    trial: Callable[[float, int], float], steps: int, *, center: float = LAMBDA_RATE, share: float = SHARE
) -> RateSearch:
    """Find a learning rate by short trials: the centre, a third and three times of it, and beyond the best at an edge.

    The centre stays unless another rate is clearly better: trials are short, and what tells near rates apart in a whole
    run cannot be seen in them. `rate_plan` says beforehand what the search costs. The loss of a trial has to depend on
    nothing but its rate: give every trial the same fresh model, seed, batches and validation rows (and never the test
    rows). In several processes return the same loss on each, so that all of them choose the same rate.

    Args:
        trial: trains a fresh copy at a rate for a number of steps, its schedule fitted to them, and returns the
            validation loss. What is not finite counts as infinitely bad.
        steps: of the run that the rate is for.
        center: where to begin: the usual rate of the method. The default is DVoRA's.
        share: of the run's steps, what all trials together may take.

    Returns:
        The rate, and every trial.

    Raises:
        ValueError: every trial diverged, the run is too short for trials, or an argument is out of range.
    """
    if not (isfinite(center) and center > 0):
        raise ValueError(f"center is {center}, expected a finite rate above zero, such as the method's usual one")
    plan = rate_plan(steps, share)
    if not plan.trials:
        raise ValueError(
            f"steps is {steps}, too short a run for trials: with share {share:g} it takes {shortest_run(share)} steps; "
            "choose a rate by hand, or give a larger share"
        )
    losses: dict[float, float] = {}
    while len(losses) < plan.trials and (rate := _next_rate(losses, center)) is not None:
        loss = float(trial(rate, plan.steps))
        losses[rate] = loss if isfinite(loss) else inf
    best = _best(losses, center)
    if losses[best] == inf:
        raise ValueError(
            f"training diverged in every trial, at learning rates from {min(losses):g} to {max(losses):g}; check the "
            "data and the model, or choose a lower rate by hand"
        )
    return RateSearch(best, plan.steps, tuple(RateTrial(*each) for each in losses.items()))


def _next_rate(losses: Mapping[float, float], center: float) -> float | None:
    """The rate to try after these; None: the best one lies between two others."""
    for first in (_rounded(center / SPACING), center, _rounded(center * SPACING)):
        if first not in losses:
            return first
    rates = sorted(losses)
    best = _best(losses, center)
    place = rates.index(best)
    if place == 0 or losses[best] == inf:
        return _rounded(rates[0] / SPACING)
    return _rounded(best * SPACING) if place == len(rates) - 1 else None


def _best(losses: Mapping[float, float], center: float) -> float:
    """The rate of the lowest loss, or the centre if that is not clearly worse."""
    lowest = min(losses, key=losses.__getitem__)
    highest = max((loss for loss in losses.values() if loss < inf), default=inf)
    is_clear = losses[center] - losses[lowest] > CLEARLY * (highest - losses[lowest])
    return lowest if is_clear else center


def _rounded(rate: float) -> float:
    """To two digits, which a reader can type to have the same run again."""
    return float(f"{rate:.2g}")
