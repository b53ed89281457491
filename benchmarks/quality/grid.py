"""A grid of runs: tasks, arms and tuning, as its file in `grids/` says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

FILE = Path(__file__).parent / "grids" / "quality.yaml"

Stage = Literal["trial", "final", "alone"]
"""Tuning; the runs that are evaluated on the test split; a few steps with nothing else running, for time and memory."""

BASELINES = ("majority", "tfidf", "frozen")
"""Methods of `baselines.baseline`; "untrained" takes no steps either, but its base may be quantised."""


@dataclass(frozen=True)
class TaskPlan:
    """How much of a task is used: the model, steps, rows of a step, and at most so many rows of each part.

    Args:
        tuned_on: the task whose tuned rates are taken over; None: its own.
        fresh: rows behind the `train` rows that the batches are of, so that the head has not seen them; 0: they are of
            the `train` rows.
    """

    model: str
    steps: int
    batch: int
    train: int
    validation: int
    test: int
    tuned_on: str | None = None
    fresh: int = 0


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Args:
        method: what `adapting.adapted` or `baselines.baseline` knows.
        r: rank of the update, for methods that have one.
        layers: a name under `layers` in the grid, or "all".
        options: further fields of the method's configuration.
        magnitude: whether there is a magnitude with a rate of its own.
        rates: adapter rates that are tried first.
        tuned_as: the arm whose tuned rates this one takes.
        rate_by: how the adapter's rate is chosen: by the trials of `tuning`, or not at all: it is the `centre`.
        centre: the method's usual rate.
        base: how the frozen weights are kept: float32, or quantised as nf4 or int8; or those of a base that was
            fine-tuned before.
        precision: dtype of the matrix products.
        vectors: dtype of the trained parameters.
        one_rate: the magnitude has the adapter's rate.
        projection_seed, order_seed: fixed seeds of the shared matrices and of the batches; None: the run's seed.
        schedule: how the rates fall after the warm-up.
        steps_factor: trains so many times as long as the task's other arms.
        rate_factor: of the rates of adapter and magnitude that are taken over.
        tasks, seeds: None: all.
    """

    method: str
    r: int | None = None
    layers: str = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    magnitude: bool = False
    rates: tuple[float, ...] = ()
    tuned_as: str | None = None
    rate_by: Literal["trials", "centre"] = "trials"
    centre: float = 0.0
    weight_decay: float = 0.0
    base: Literal["float32", "nf4", "int8", "fine_tuned"] = "float32"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    vectors: Literal["float32", "bfloat16"] = "float32"
    one_rate: bool = False
    projection_seed: int | None = None
    order_seed: int | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    steps_factor: int = 1
    rate_factor: float = 1.0
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rates:
    """Highest learning rates; None where there is nothing of that group."""

    adapter: float
    magnitude: float | None
    head: float | None


@dataclass(frozen=True)
class Run:
    """One run, and one row of the result file."""

    task: str
    arm: str
    stage: Stage
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

    def arms_of(self, task: str) -> dict[str, Arm]:
        """The arms that run on a task."""
        return {name: arm for name, arm in self.arms.items() if arm.tasks is None or task in arm.tasks}

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """The final seeds of an arm."""
        return arm.seeds or tuple(self.training["final_seeds"])


def read_grid(file: Path = FILE) -> Grid:
    """The grid of a YAML file.

    Raises:
        ValueError: an arm names a task or another arm that is not there, or is to be tuned though it has one rate.
        TypeError: an entry has a key that is none.
    """
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    tasks = {name: TaskPlan(**entry) for name, entry in content["tasks"].items()}
    arms = {name: Arm(**_tuples(entry)) for name, entry in content["arms"].items()}
    for name, arm in arms.items():
        if unknown := set(arm.tasks or ()) - set(tasks):
            raise ValueError(f"arm {name!r} names the task {min(unknown)!r}; there are {', '.join(tasks)}")
        if arm.tuned_as is not None and not arms.get(arm.tuned_as, arm).rates:
            raise ValueError(f"arm {name!r} is tuned as {arm.tuned_as!r}, which is no arm with rates")
        if arm.rate_by != "trials" and not (arm.centre > 0 and arm.rates):
            raise ValueError(f"arm {name!r} has rate_by {arm.rate_by!r}, which needs a centre and rates; give it both")
        if arm.one_rate and arm.rates:
            raise ValueError(f"arm {name!r} has one rate, which is not tuned by itself; give it tuned_as")
    return Grid(content["training"], content["tuning"], tasks, content["layers"], arms)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
