"""Scores of arms on tasks, their differences, and what an arm costs, from the rows; pure functions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.items import unpacked
from benchmarks.quality.statistics import (
    Difference,
    Interval,
    Kind,
    mean_difference,
    over_seeds,
    paired_difference,
    scores,
)
from benchmarks.quality.tuning import loss_of

KINDS: Mapping[str, Kind] = {
    "movie_reviews": "accuracy",
    "movie_ratings": "pearson",
    "tweets": "accuracy",
    "wordnet10": "accuracy",
    "fashion_mnist": "accuracy",
    "shakespeare": "bits",
    "countries": "accuracy",
    "webster_fields": "accuracy",
    "code_languages": "accuracy",
    "wordnet_topics": "accuracy",
    "cron_expressions": "accuracy",
}
LABELS = {
    "movie_reviews": "movie reviews, accuracy %",
    "movie_ratings": "movie ratings, Pearson x 100",
    "tweets": "tweets, accuracy %",
    "wordnet10": "WordNet-10, accuracy %",
    "fashion_mnist": "Fashion-MNIST, accuracy %",
    "shakespeare": "Shakespeare, bits per byte",
    "countries": "countries, accuracy %",
    "webster_fields": "Webster's fields, accuracy %",
    "code_languages": "code languages, accuracy %",
    "wordnet_topics": "WordNet topics, accuracy %",
    "cron_expressions": "cron expressions, right answers %",
}
ARMS = {
    "majority": "majority or constant",
    "tfidf": "TF-IDF, linear model",
    "frozen": "frozen base, best head",
    "full": "full fine-tuning",
    "lora_r8": "LoRA r=8",
    "lora_r1": "LoRA r=1",
    "dora_r8": "DoRA r=8",
    "vera": "VeRA r=256",
    "ia3": "(IA)3",
    "bitfit": "BitFit",
    "magnitude": "magnitude only",
    "dvora": "DVoRA r=256, dense",
    "dvora_structured": "DVoRA r=256, structured",
}
"""The arms of the main table, in its order."""
EQUAL_VALUES = {
    "vera": "VeRA r=256",
    "vera_equal": "VeRA r=832",
    "lora_r1": "LoRA r=1",
    "lora_query_value": "LoRA r=5, query and value",
    "dvora_attention": "DVoRA r=256, attention only",
}
CHOICES = {
    "direction_weight": "direction: weight",
    "detached_norm": "detached norm",
    "d_initial_0.01": "d_initial 0.01",
    "d_initial_1": "d_initial 1",
    "lambda_d_frozen": "lambda_d not trained",
    "magnitude": "magnitude only",
    "one_rate": "one rate for all vectors",
    "weight_decay": "weight decay 0.1",
    "dvora_attention": "attention only",
    "feed_forward": "feed-forward only",
    "query_value": "query and value only",
    "orthogonal": "orthogonal matrices",
    "dvora_structured": "structured matrices",
    "gaussian": "Gaussian matrices",
    "rademacher": "matrices of signs",
    "vectors_bfloat16": "vectors in bfloat16",
    "dvora_float32": "products in float32",
}
RANKS = {
    "dvora_r16": "dense, r=16",
    "dvora_r64": "dense, r=64",
    "dvora": "dense, r=256",
    "dvora_r1024": "dense, r=1024",
    "structured_r16": "structured, r=16",
    "structured_r64": "structured, r=64",
    "dvora_structured": "structured, r=256",
    "structured_r1024": "structured, r=1024",
}
QUANTISED = {
    "frozen": "frozen base",
    "frozen_nf4": "frozen base, nf4",
    "vera": "VeRA r=256",
    "vera_nf4": "VeRA r=256, nf4",
    "lora_r8": "LoRA r=8",
    "lora_r8_nf4": "LoRA r=8, nf4",
    "dvora": "DVoRA r=256",
    "dvora_nf4": "DVoRA r=256, nf4",
    "dvora_int8": "DVoRA r=256, int8",
}
SEEDS = {
    "dvora_projections": ("DVoRA, other matrices", "dvora"),
    "dvora_orders": ("DVoRA, other batches", "dvora"),
    "vera_projections": ("VeRA, other matrices", "vera"),
}
"""Arms of question 6, and the arm whose seed 0 belongs to them."""
REQUIRED_ARM = {
    "methods": "vera",
    "equal_values": "vera_equal",
    "ranks": "dvora_r64",
    "choices": "detached_norm",
    "rates": "vera",
    "long": "vera_long",
    "quantised": "dvora_nf4",
    "seeds": "dvora_projections",
    "pareto": "vera",
}
"""By table and picture: a task is shown only if it has runs of this arm."""


def name_of(task: str) -> str:
    """Of `LABELS`, without what its score is."""
    return LABELS[task].partition(",")[0]


def names_of(tasks: Sequence[str]) -> str:
    """For a sentence or a heading."""
    return ", ".join(map(name_of, tasks))


@dataclass(frozen=True)
class Result:
    """The rows of the result file."""

    rows: tuple[dict[str, Any], ...]

    def finals(self, task: str, arm: str) -> dict[int, dict[str, Any]]:
        """The evaluated rows of an arm by seed; runs that failed or diverged have no test score and are left out."""
        found = (row for row in self.rows if (row["task"], row["arm"], row["stage"]) == (task, arm, "final"))
        return {row["seed"]: row for row in found if row.get("test")}

    def tasks(self, question: str) -> list[str]:
        """The tasks that a table or picture shows: those with runs of its `REQUIRED_ARM`."""
        return [task for task in KINDS if self.finals(task, REQUIRED_ARM[question])]

    def tuned_tasks(self) -> list[str]:
        """Those of "rates" whose own trials chose the rates."""
        return [task for task in self.tasks("rates") if self.trials(task, REQUIRED_ARM["rates"])]

    def failed(self) -> list[dict[str, Any]]:
        """Rows of runs that raised an error, and of final runs that diverged."""
        return [row for row in self.rows if "error" in row or (row.get("diverged") and row["stage"] == "final")]

    def score(self, task: str, arm: str) -> Interval | None:
        """Mean test score over seeds, in the units of `LABELS`."""
        rows = self.finals(task, arm)
        if not rows:
            return None
        reference = self._reference(task)
        values = scores(KINDS[task], self._items(task, list(rows.values())), reference, np.ones((1, len(reference))))[0]
        return over_seeds(-values if KINDS[task] == "bits" else values)

    def gain(self, task: str, arm: str, over: str) -> Interval | None:
        """How much better an arm is than another on the seeds that both have; bits are turned so that more is better.

        None where one of them has no rows.
        """
        return self.mean_gain([(task, arm, over)])

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
        return paired_difference(KINDS[task], *(self._items(task, rows) for rows in both), self._reference(task))

    def fewer_seeds(self, task: str, arm: str, over: str) -> int:
        """How many seeds an arm that is trained has, if it has fewer than the other; else zero."""
        ours, theirs = self.finals(task, arm), self.finals(task, over)
        return 0 if _takes_no_steps(ours) or len(ours) >= len(theirs) else len(ours)

    def trials(self, task: str, arm: str) -> list[tuple[float, float]]:
        """(adapter rate, validation loss) of the trials with the usual rates of magnitude and head beside it, by rate.

        A loss that is not finite counts as infinite.
        """
        rows = [row for row in self.rows if (row["task"], row["arm"], row["stage"]) == (task, arm, "trial")]
        usual = Counter(map(_beside, rows)).most_common(1)
        kept = [row for row in rows if _beside(row) == usual[0][0]]
        return sorted((row["rates"]["adapter"], loss_of(row)) for row in kept)

    def start_loss(self, task: str) -> float:
        """Validation loss of the frozen model with the best head, where every method starts."""
        return loss_of(self.finals(task, "frozen")[0])

    def lost(self, task: str, arm: str) -> dict[float, float]:
        """By the adapter's rate, the share of what tuning gained that is lost with it: 0 with the best, 1 at the start.

        (loss - best loss) / (frozen loss - best loss) on validation rows.
        """
        losses, start = dict(self.trials(task, arm)), self.start_loss(task)
        best = min(losses.values(), default=start)
        return {rate: (loss - best) / (start - best) for rate, loss in losses.items()}

    def plateau(self, task: str, arm: str) -> tuple[float, bool] | None:
        """By which factor the adapter's rate may vary, and whether it was seen to end on both sides.

        The range around the best trial in which the validation loss, drawn in straight lines over the logarithm of the
        rate, is within a quarter of what training gained.
        """
        points = self.trials(task, arm)
        if len(points) < 3:
            return None
        rates, losses = np.log([rate for rate, _ in points]), np.array([loss for _, loss in points])
        best = int(losses.argmin())
        limit = losses[best] + 0.25 * (self.start_loss(task) - losses[best])
        low, low_ends = _crossing(rates[best::-1], losses[best::-1], limit)
        high, high_ends = _crossing(rates[best:], losses[best:], limit)
        return float(np.exp(high - low)), low_ends and high_ends

    def size(self, task: str, arm: str, what: str) -> int | None:
        """`trained_values` or `saved_bytes` of an arm, without the head, which is the same for all."""
        return next((row[what] for row in self.finals(task, arm).values() if what in row), None)

    def alone(self, task: str, arm: str) -> dict[str, Any] | None:
        """The row of a few steps in a process that did nothing else."""
        found = [row for row in self.rows if (row["task"], row["arm"], row["stage"]) == (task, arm, "alone")]
        return found[0] if found and "peak_bytes" in found[0] else None

    def step(self, task: str, arm: str) -> float | None:
        """Seconds of a training step, of the row of `alone`."""
        row = self.alone(task, arm)
        return None if row is None else row["seconds_per_step"]

    def spread(self, task: str, arm: str, first: str | None = None) -> float | None:
        """Standard deviation of the test score over seeds, in the units of `LABELS`.

        Args:
            first: another arm whose seed 0 is one of this arm's.
        """
        values = [row["test"]["score"] for row in self.finals(task, arm).values()]
        if first is not None and 0 in (rows := self.finals(task, first)):
            values.append(rows[0]["test"]["score"])
        factor = 1 if KINDS[task] == "bits" else 100
        return factor * float(np.std(values, ddof=1)) if len(values) > 1 else None

    def lowest_loss(self, task: str, arms: Sequence[str]) -> str | None:
        """The arm with the lowest mean validation loss over its final runs."""
        losses = {
            arm: float(np.mean([loss_of(row) for row in self.finals(task, arm).values()]))
            for arm in arms
            if self.finals(task, arm)
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def worse_than_the_start(self) -> list[dict[str, Any]]:
        """Trials with a higher validation loss than the frozen model's."""
        trials = [row for row in self.rows if row["stage"] == "trial" and self.finals(row["task"], "frozen")]
        return [row for row in trials if loss_of(row) > self.start_loss(row["task"])]

    def _items(self, task: str, rows: list[dict[str, Any]]) -> np.ndarray:
        """(rows, items): the per-item values of the test split."""
        kind = "bits" if KINDS[task] == "accuracy" else "numbers"
        return np.stack([unpacked(row["items"], kind, row["test_items"]) for row in rows])

    def _reference(self, task: str) -> np.ndarray:
        """(items,) true numbers or bytes, which the row of the majority has; zeros where nothing reads them."""
        row = self.finals(task, "majority")[0]
        count: int = row["test_items"]
        return np.zeros(count) if KINDS[task] == "accuracy" else unpacked(row["reference"], "numbers", count)


def _beside(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The magnitude's rate as a share of the adapter's, and the head's rate."""
    rates = row["rates"]
    return rates["magnitude"] and round(rates["magnitude"] / rates["adapter"], 6), rates["head"]


def _crossing(rates: np.ndarray, losses: np.ndarray, limit: float) -> tuple[float, bool]:
    """Where the losses first rise to the limit, going away from the best; the last rate if they do not."""
    for place in range(1, len(losses)):
        if losses[place] > limit:
            rise = np.minimum(losses[place], 1e3) - losses[place - 1]
            return float(
                rates[place - 1] + (rates[place] - rates[place - 1]) * (limit - losses[place - 1]) / rise
            ), True
    return float(rates[-1]), False


def _takes_no_steps(rows: dict[int, dict[str, Any]]) -> bool:
    return len(rows) == 1 and rows.get(0, {}).get("steps") == 0


def result_of(content: Mapping[str, Any]) -> Result:
    """The result of a file's content."""
    return Result(tuple(content["rows"]))
