"""Scores of arms on tasks and their differences, from the rows of a result file; pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.evaluation import unpacked
from benchmarks.quality.grid import loss_of
from benchmarks.quality.statistics import (
    Difference,
    Interval,
    Kind,
    mean_difference,
    over_seeds,
    paired_difference,
    scores,
)

NUMBERS = ("movie_ratings",)
"""Tasks scored by 100 times Pearson's correlation; all others by accuracy in percent."""
NAMES: Mapping[str, str] = {
    "movie_ratings": "movie ratings",
    "countries": "countries",
    "webster_fields": "Webster's fields",
    "code_languages": "code languages",
    "wordnet_topics": "WordNet topics",
    "cron_expressions": "cron expressions",
}
"""Tasks of the grid, in the order of the tables."""
LABELLED = tuple(name for name in NAMES if name != "cron_expressions")
"""Tasks without generated answers."""


@dataclass(frozen=True)
class Result:
    """The rows of the result file."""

    rows: tuple[dict[str, Any], ...]

    def finals(self, task: str, arm: str) -> dict[int, dict[str, Any]]:
        """The evaluated rows of an arm by seed; runs that failed or diverged have no test score and are left out."""
        found = (row for row in self.rows if (row["task"], row["arm"], row["stage"]) == (task, arm, "final"))
        return {row["seed"]: row for row in found if row.get("test")}

    def tasks(self, *arms: str) -> list[str]:
        """Tasks of `LABELLED` on which all of these arms were evaluated."""
        return [task for task in LABELLED if all(self.finals(task, arm) for arm in arms)]

    def score(self, task: str, arm: str) -> Interval | None:
        """Mean test score over seeds."""
        rows = self.finals(task, arm)
        if not rows:
            return None
        reference = self._reference(task)
        items = self._items(task, list(rows.values()))
        return over_seeds(scores(_kind(task), items, reference, np.ones((1, len(reference))))[0])

    def gain(self, tasks: Sequence[str], arm: str, over: str) -> Interval | None:
        """How many points an arm is above another: a mean over tasks, on the seeds that both have.

        None where one of them has no rows.
        """
        return self.mean_gain([(task, arm, over) for task in tasks])

    def gain_over_tasks(self, tasks: Sequence[str], arm: str, over: str) -> Interval | None:
        """The same mean, with the interval that it has if tasks are drawn too; None where one of them has no rows."""
        gains = [self.gain([task], arm, over) for task in tasks]
        return over_seeds(np.array([gain.mean for gain in gains if gain])) if all(gains) else None

    def mean_gain(self, pairs: Sequence[tuple[str, str, str]]) -> Interval | None:
        """The mean of gains over (task, arm, other arm); None where one of them has no rows."""
        differences = [self._difference(*pair) for pair in pairs]
        known = [each for each in differences if each is not None]
        return mean_difference(known) if known and len(known) == len(pairs) else None

    def _difference(self, task: str, arm: str, over: str) -> Difference | None:
        """On the seeds that both have.

        A baseline, which has one row since it takes no steps, is compared with every seed of the other.
        """
        ours, theirs = self.finals(task, arm), self.finals(task, over)
        if _takes_no_steps(ours):
            ours = dict.fromkeys(theirs, ours[0])
        if _takes_no_steps(theirs):
            theirs = dict.fromkeys(ours, theirs[0])
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            return None
        both = ([rows[seed] for seed in seeds] for rows in (ours, theirs))
        return paired_difference(_kind(task), *(self._items(task, rows) for rows in both), self._reference(task))

    def steps(self, task: str, arm: str) -> int:
        """Of an arm's final runs."""
        count: int = next(iter(self.finals(task, arm).values()))["steps"]
        return count

    def size(self, task: str, arm: str, what: str) -> int | None:
        """`trained_values` or `saved_bytes` of an arm, without the head, which is the same for all."""
        return next((row[what] for row in self.finals(task, arm).values() if what in row), None)

    def lowest_loss(self, task: str, arms: Sequence[str]) -> str | None:
        """The arm with the lowest mean validation loss over its final runs."""
        losses = {
            arm: float(np.mean([loss_of(row) for row in self.finals(task, arm).values()]))
            for arm in arms
            if self.finals(task, arm)
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def _items(self, task: str, rows: list[dict[str, Any]]) -> np.ndarray:
        """(rows, items): the per-item values of the test split."""
        kind = "numbers" if task in NUMBERS else "bits"
        return np.stack([unpacked(row["items"], kind, row["test_items"]) for row in rows])

    def _reference(self, task: str) -> np.ndarray:
        """(items,) true numbers, which the row of the majority has; zeros where nothing reads them."""
        row = self.finals(task, "majority")[0]
        count: int = row["test_items"]
        return unpacked(row["reference"], "numbers", count) if task in NUMBERS else np.zeros(count)


def _kind(task: str) -> Kind:
    return "pearson" if task in NUMBERS else "accuracy"


def _takes_no_steps(rows: dict[int, dict[str, Any]]) -> bool:
    return len(rows) == 1 and rows.get(0, {}).get("steps") == 0


def result_of(content: Mapping[str, Any]) -> Result:
    """The result of a file's content."""
    return Result(tuple(content["rows"]))
