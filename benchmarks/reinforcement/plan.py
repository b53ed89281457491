"""Which runs there are: three rates of each arm in short runs, then the best of them with every seed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.reinforcement.arms import BASE, RATES

TRIAL_STEPS, STEPS = 20, 50
TRIAL_SEED, SEEDS = 100, (0, 1, 2)

Rows = Mapping[str, dict[str, Any]]
"""Finished rows by their keys."""


@dataclass(frozen=True)
class Plan:
    """One run: its arguments in `training.run`."""

    problem: str
    arm: str
    rate: float
    seed: int
    steps: int
    part: str

    @property
    def key(self) -> str:
        """Identifies the run."""
        return f"{self.problem} {self.arm} {self.part} rate {self.rate:.3g} seed {self.seed} steps {self.steps}"


def missing(rows: Rows, problems: list[str], arms: list[str]) -> Iterator[Plan]:
    """The runs without a row that can start now, the most important first: trials, then seed after seed."""
    every = [(problem, arm) for problem in problems for arm in arms]
    wanted = [Plan(problem, BASE, 0.0, 0, 0, "test") for problem in problems]
    wanted += [trial for problem, arm in every for trial in trials(problem, arm)]
    wanted += [final for seed in SEEDS for problem, arm in every if (final := chosen(rows, problem, arm, seed))]
    return (plan for plan in wanted if plan.key not in rows)


def trials(problem: str, arm: str) -> list[Plan]:
    """Short runs of each rate, evaluated on validation questions."""
    return [Plan(problem, arm, rate, TRIAL_SEED, TRIAL_STEPS, "validation") for rate in RATES[arm]]


def chosen(rows: Rows, problem: str, arm: str, seed: int) -> Plan | None:
    """The whole run with the rate that solved most validation questions; None while trials are missing."""
    found = [rows.get(trial.key) for trial in trials(problem, arm)]
    if any(row is None for row in found):
        return None
    best = max((row for row in found if row), key=lambda row: sum(row["solved"]))
    return Plan(problem, arm, best["rate"], seed, STEPS, "test")
