"""The rule on diagonals: who counts as a rival, what "best" means, which number is the default."""

from typing import Any

import numpy as np
import pytest

from benchmarks.quality.evaluation import packed
from benchmarks.quality.frontier import DIAGONALS, default, is_best, rivals
from benchmarks.quality.summary import Result

ITEMS, TASKS = 50, ["countries"]


def finals(arm: str, values: int, right: int, validation: float = 0.5, seeds: int = 2) -> list[dict[str, Any]]:
    """The rows of an arm that trains so many values and has so many right answers."""
    scores = {"validation": {"loss": 0.5, "score": validation}, "test": {"loss": 1.0, "score": right / ITEMS}}
    items = packed(np.arange(ITEMS) < right)
    row = {"task": "countries", "arm": arm, "stage": "final", "steps": 10, "trained_values": values, **scores}
    return [{**row, "seed": seed, "test_items": ITEMS, "items": items} for seed in range(seeds)]


def result(*arms: list[dict[str, Any]]) -> Result:
    majority = finals("majority", 0, 1, seeds=1)[0] | {"steps": 0}
    return Result((majority, *(row for arm in arms for row in arm)))


def test_rivals_have_at_most_as_many_bytes_and_the_strongest_is_first() -> None:
    rows = result(
        finals("diagonals_3", 100, 40),
        finals("lora_r1", 90, 30),
        finals("shira_r2", 100, 35),
        finals("lora_r8", 101, 50),
    )
    beside = rivals(rows, TASKS, "diagonals_3")
    assert [(each.arm, each.size) for each in beside] == [("shira_r2", 200), ("lora_r1", 180)]
    assert [each.gain.mean for each in beside] == pytest.approx([10, 20])
    assert is_best(rows, TASKS, "diagonals_3")


@pytest.mark.parametrize("right", [40, 41])
def test_who_is_not_above_every_rival_is_not_the_best(right: int) -> None:
    assert not is_best(result(finals("diagonals_3", 100, 40), finals("road", 100, right)), TASKS, "diagonals_3")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((0.80, 0.81, 0.82, 0.83, 0.84), 12), ((0.80, 0.804, 0.806, 0.90, 0.91), 2), ((0.80, 0.80, 0.90, 0.9, 0.9), 1)],
)
def test_more_diagonals_are_taken_while_they_are_worth_it(scores: tuple[float, ...], expected: int) -> None:
    arms = (finals(arm, 10, 40, score) for arm, score in zip(DIAGONALS, scores, strict=True))
    assert DIAGONALS[default(result(*arms), TASKS)] == expected
