"""What the rows say: scores of arms on tasks, their differences, and what an arm costs; pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.quality.items import unpacked
from benchmarks.quality.statistics import Interval, Kind, over_seeds, paired_difference, scores

KINDS: Mapping[str, Kind] = {
    "movie_reviews": "accuracy",
    "movie_ratings": "pearson",
    "tweets": "accuracy",
    "wordnet10": "accuracy",
    "fashion_mnist": "accuracy",
    "shakespeare": "bits",
}
LABELS = {
    "movie_reviews": "movie reviews, accuracy %",
    "movie_ratings": "movie ratings, Pearson x 100",
    "tweets": "tweets, accuracy %",
    "wordnet10": "WordNet-10, accuracy %",
    "fashion_mnist": "Fashion-MNIST, accuracy %",
    "shakespeare": "Shakespeare, bits per byte",
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
    "dvora_orthogonal": "DVoRA r=256, orthogonal",
    "dvora_structured": "DVoRA r=256, structured",
}
"""The arms of the main table, in its order."""
EQUAL_VALUES = {
    "vera": "VeRA r=256",
    "vera_equal": "VeRA of higher rank",
    "lora_r1": "LoRA r=1",
    "lora_query_value": "LoRA r=5 or 6, query and value",
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
    "dvora_orthogonal": "orthogonal matrices",
    "dvora_structured": "structured matrices",
    "gaussian": "Gaussian matrices",
    "rademacher": "matrices of signs",
    "vectors_bfloat16": "vectors in bfloat16",
    "dvora_float32": "products in float32",
}


@dataclass(frozen=True)
class Result:
    """The rows of the result file."""

    rows: tuple[dict[str, Any], ...]

    def finals(self, task: str, arm: str) -> dict[int, dict[str, Any]]:
        """The judged rows of an arm by seed; runs that failed or diverged have no test score and are left out."""
        found = (row for row in self.rows if (row["task"], row["arm"], row["stage"]) == (task, arm, "final"))
        return {row["seed"]: row for row in found if row.get("test")}

    def failed(self) -> list[dict[str, Any]]:
        """Rows of runs that raised an error, and of final runs that diverged."""
        return [row for row in self.rows if "error" in row or (row.get("diverged") and row["stage"] == "final")]

    def told(self, task: str, arm: str, seeds: list[int]) -> np.ndarray:
        """(seeds, items) of an arm."""
        rows, kind = self.finals(task, arm), "bits" if KINDS[task] == "accuracy" else "numbers"
        return np.stack([unpacked(rows[seed]["items"], kind, rows[seed]["test_items"]) for seed in seeds])

    def score(self, task: str, arm: str) -> Interval | None:
        """Mean test score over seeds, in the units of `LABELS`."""
        rows = self.finals(task, arm)
        if not rows:
            return None
        reference = self._reference(task)
        values = scores(KINDS[task], self.told(task, arm, list(rows)), reference, np.ones((1, len(reference))))[0]
        return over_seeds(-values if KINDS[task] == "bits" else values)

    def gain(self, task: str, arm: str, over: str) -> Interval | None:
        """How much better an arm is than another on the seeds that both have; bits are turned so that more is better.

        An arm without a seed of its own, such as a baseline, is compared with every seed of the other.
        """
        ours, theirs = self.finals(task, arm), self.finals(task, over)
        seeds = sorted(set(ours) & set(theirs))
        if len(theirs) == 1 and len(ours) > 1:
            return self._difference(task, arm, list(ours), over, list(theirs) * len(ours))
        return self._difference(task, arm, seeds, over, seeds) if seeds else None

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

    def seeds(self, task: str, arm: str) -> int:
        """How many final runs an arm has."""
        return len(self.finals(task, arm))

    def _difference(self, task: str, arm: str, seeds: list[int], over: str, others: list[int]) -> Interval:
        ours, theirs = self.told(task, arm, seeds), self.told(task, over, others)
        return paired_difference(KINDS[task], ours, theirs, self._reference(task))

    def _reference(self, task: str) -> np.ndarray:
        """(items,) true numbers or bytes, which the row of the majority has; zeros where nothing reads them."""
        row = self.finals(task, "majority")[0]
        count: int = row["test_items"]
        return np.zeros(count) if KINDS[task] == "accuracy" else unpacked(row["reference"], "numbers", count)


def result_of(content: Mapping[str, Any]) -> Result:
    """The result of a file's content."""
    return Result(tuple(content["rows"]))
