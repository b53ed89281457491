"""A grid of runs as its file says (tasks, arms, seeds), and which runs follow from the finished ones.

An arm's rates are tuned on each task by as many trials as every other arm's, in as many steps as the final runs, by
validation loss alone: three rates, then one more, beyond the best if it is at an edge, else beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

FILE = Path(__file__).parent / "equal_bytes.yaml"
FIXED = ("majority", "frozen")
"""Methods that take no steps: the commonest answer, and the base with the head that is best for its features."""

Rows = Mapping[str, Mapping[str, Any]]
"""Finished rows by the key of their run."""


@dataclass(frozen=True)
class TaskPlan:
    """How much of a task is used: the model, steps, rows of a step, and at most so many rows of each part.

    Args:
        fresh: rows behind the `train` rows, which the head was fitted to, that the batches are of; 0: of those rows.
        with_train: whether the batches are of the `train` rows too.
    """

    model: str
    steps: int
    batch: int
    train: int
    validation: int
    test: int
    fresh: int = 0
    with_train: bool = False


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Args:
        method: of `FIXED` or `methods.METHODS`, "full", "bitfit", "parts", "grouped" or "diagonals".
        r: rank of the update, for methods that have one, or the number of diagonals.
        layers: a name under `layers` in the grid, or "all".
        options: further fields of the method's configuration.
        magnitude: whether there is a magnitude with a rate of its own.
        rates: of the adapter, that are tried first, or the only one; without them those of `tuned_as` are taken.
        rate: of the adapter, where it is not tuned.
        tuned_as: the arm whose tuned rates this one takes, times `rate_factor`.
        base: float32, quantised as nf4, or fine_tuned before.
        head_rows: what its head is fitted to: the task's `train` rows, or all, which are those and the `fresh` ones, or
            half of all, where the batches are of all.
        refit: whether a head is fitted to what the trained backbone gives, besides.
        schedule: how the rates fall after the warm-up.
        steps_factor: trains so many times as long as the task's other arms, in trials too.
        steps: by task, where they are no multiple.
        tasks, seeds: None: all. Without final seeds an arm is only tried.
    """

    method: str
    r: int | None = None
    layers: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    magnitude: bool = False
    rates: tuple[float, ...] = ()
    rate: float | None = None
    tuned_as: str | None = None
    rate_factor: float = 1.0
    base: Literal["float32", "nf4", "fine_tuned"] = "float32"
    head_rows: Literal["train", "all", "half"] = "train"
    refit: bool = False
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    steps_factor: float = 1
    steps: Mapping[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rates:
    """Highest learning rates; None where there is nothing of that group."""

    adapter: float
    magnitude: float | None
    head: float | None

    def times(self, factor: float) -> "Rates":
        """The rates of adapter and magnitude go together."""
        return replace(self, adapter=self.adapter * factor, magnitude=self.magnitude and self.magnitude * factor)


@dataclass(frozen=True)
class Run:
    """One run, and one row of the result file."""

    task: str
    arm: str
    stage: Literal["trial", "final"]
    seed: int
    steps: int
    rates: Rates | None

    @property
    def key(self) -> str:
        """Identifies the run."""
        rates = self.rates and (self.rates.adapter, self.rates.magnitude, self.rates.head)
        suffix = "" if rates is None else " " + "/".join("-" if rate is None else f"{rate:.3g}" for rate in rates)
        return f"{self.task} {self.arm} {self.stage} seed {self.seed} steps {self.steps}{suffix}"


@dataclass(frozen=True)
class Grid:
    """Everything in the file."""

    training: Mapping[str, Any]
    tuning: Mapping[str, Any]
    tasks: Mapping[str, TaskPlan]
    layers: Mapping[str, Mapping[str, str]]
    arms: Mapping[str, Arm]

    def runs_on(self, task: str, name: str) -> bool:
        """Whether an arm runs on a task."""
        return self.arms[name].tasks is None or task in self.arms[name].tasks

    def plan(self, task: str, name: str) -> TaskPlan:
        """A task as an arm reads it."""
        plan, head_rows = self.tasks[task], self.arms[name].head_rows
        if head_rows == "train":
            return plan
        count = plan.train + plan.fresh
        first = count if head_rows == "all" else count // 2
        return replace(plan, train=first, fresh=count - first, with_train=True)

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The final seeds of an arm."""
        seeds = self.arms[name].seeds
        return tuple(self.training["final_seeds"]) if seeds is None else seeds

    def waiting(self, rows: Rows, tasks: Sequence[str], arms: Sequence[str]) -> Iterator[Run]:
        """Runs that can start now, the most important first; those that have a row already are among them.

        Tuning first, then the final runs, one seed of every arm before the next seed of any.
        """
        pairs = [(task, name) for task in tasks for name in arms if self.runs_on(task, name)]
        for task, name in pairs:
            if self.arms[name].rates:
                yield from self.trials(task, name, rows)
        for seed in sorted({seed for name in arms for seed in self.seeds_of(name)}):
            finals = [self.final(task, name, seed, rows) for task, name in pairs if seed in self.seeds_of(name)]
            yield from (run for run in finals if run)

    def steps(self, task: str, name: str) -> int:
        """Of an arm's runs on a task."""
        arm = self.arms[name]
        return arm.steps.get(task) or round(self.tasks[task].steps * arm.steps_factor)

    def final(self, task: str, name: str, seed: int, rows: Rows) -> Run | None:
        """The run that is evaluated on the test split; None until its rates are chosen."""
        arm = self.arms[name]
        if arm.method in FIXED:
            return Run(task, name, "final", seed, 0, None)
        rates = self.chosen(task, name, rows)
        return rates and Run(task, name, "final", seed, self.steps(task, name), rates)

    def chosen(self, task: str, name: str, rows: Rows) -> Rates | None:
        """The rates of an arm's final runs; None while trials are missing."""
        arm = self.arms[name]
        if arm.tuned_as:
            rates = self.chosen(task, arm.tuned_as, rows)
            return rates and rates.times(arm.rate_factor)
        if arm.rate:
            return self._usual(task, arm, arm.rate)
        runs = self.trials(task, name, rows)
        is_finished = all(run.key in rows for run in runs)
        return min(runs, key=lambda run: loss_of(rows[run.key])).rates if is_finished else None

    def trials(self, task: str, name: str, rows: Rows) -> list[Run]:
        """The trials that follow from the finished ones, which are included."""
        arm, steps = self.arms[name], self.steps(task, name)
        middle = sorted(arm.rates)[len(arm.rates) // 2]
        start = self._usual(task, arm, middle)
        seed = self.training["tuning_seed"]
        runs = [Run(task, name, "trial", seed, steps, start.times(rate / middle)) for rate in arm.rates]
        if len(runs) > 1 and all(run.key in rows for run in runs):
            losses = {run.rates.adapter: loss_of(rows[run.key]) for run in runs if run.rates}
            best = min(losses, key=losses.__getitem__)
            rates = start.times(best / middle)
            last = one_more(losses, self.tuning["between"])
            runs.append(Run(task, name, "trial", seed, steps, rates.times(last / rates.adapter)))
        return runs

    def _usual(self, task: str, arm: Arm, rate: float) -> Rates:
        """An adapter's rate with the usual ones of magnitude and head beside it."""
        model = self.tasks[task].model
        magnitude = self.tuning["magnitude_rate"][model] if arm.magnitude else None
        return Rates(rate, magnitude, self.tuning["head_rate"][model])


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


def read_grid(file: Path = FILE) -> Grid:
    """The grid of a YAML file.

    What it does not say of training, tuning and layers is `FILE`'s, and so are tasks in a list. A `model` is of all.
    """
    first, content = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (FILE, file))
    of_all = {"model": content["model"]} if "model" in content else {}
    plans = content["tasks"] if isinstance(content["tasks"], dict) else {n: first["tasks"][n] for n in content["tasks"]}
    tasks = {name: TaskPlan(**{**plan, **of_all}) for name, plan in plans.items()}
    arms = {name: Arm(**_tuples(entry)) for name, entry in content["arms"].items()}
    training, tuning, layers = ({**first[name], **content.get(name, {})} for name in ("training", "tuning", "layers"))
    return Grid(training, tuning, tasks, layers, arms)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
