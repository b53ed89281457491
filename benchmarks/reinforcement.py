"""The table of GRPO on SmolLM2 with rewards that a program checks: what is solved, beside the bytes of an adapter.

The runs are over: what made the rows of `results/reinforcement.json` is in git's history (`LOG.md` says where).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.page import LABELS, YARDSTICK
from benchmarks.quality.statistics import Difference, mean_difference, paired_difference
from benchmarks.tables import kilobytes, points, table, text

PROBLEMS = ("sums", "dates")
ORDER = ("magnitude", "vera_r256", "lora_r1", "structured_r64", "dvora_r256", "dora_r8", "lora_r16", "full")

Rows = Sequence[Mapping[str, Any]]


def reinforcement(content: Mapping[str, Any]) -> str:
    """One row an arm: the share of test questions that it solves, and how much more than LoRA r=1."""
    rows, environment = content["rows"], content["environment"]
    head = [
        "",
        "kB, float16",
        *(cell for name in PROBLEMS for cell in (f"{name}: solved, %", "above LoRA r=1")),
        "both problems",
    ]
    hours, questions = sum(row["seconds"] for row in rows) / 3600, len(_solved(rows, "sums", YARDSTICK)[0])
    lines = [_cells(rows, arm, label) for arm, label in {"base": "base", **{a: LABELS[a] for a in ORDER}}.items()]
    return text(
        table(head, lines),
        f"50 steps, 3 seeds, greedy answers to {questions} questions that training never saw; {len(rows)} runs, "
        f"{hours:.0f} hours of one core (`benchmarks/results/reinforcement.json`; torch {environment['torch']}, PEFT "
        f"{environment['peft']}, CPU).",
    )


def _cells(rows: Rows, arm: str, label: str) -> list[str]:
    size = next((row["smallest_bytes"] for row in rows if row["arm"] == arm and "smallest_bytes" in row), None)
    cells, gains = [label, kilobytes(size)], []
    for problem in PROBLEMS:
        cells.append(f"{100 * np.mean(list(_solved(rows, problem, arm).values())):.1f}")
        if arm in ("base", YARDSTICK):
            cells.append("")
        else:
            gains.append(_gain(rows, problem, arm))
            cells.append(_shown(gains[-1:]))
    return [*cells, _shown(gains) if gains else ""]


def _shown(gains: Sequence[Difference]) -> str:
    gain = mean_difference(gains)
    return points(gain.mean, gain)


def _gain(rows: Rows, problem: str, arm: str) -> Difference:
    ours, theirs = (_solved(rows, problem, each) for each in (arm, YARDSTICK))
    seeds = sorted(set(ours) & set(theirs))
    both = [np.array([solved[seed] for seed in seeds]) for solved in (ours, theirs)]
    return paired_difference("accuracy", *both, np.zeros(both[0].shape[1]))


def _solved(rows: Rows, problem: str, arm: str) -> dict[int, list[int]]:
    """By seed, whether the answer to each test question is right."""
    wanted = (problem, arm, "test")
    return {row["seed"]: row["solved"] for row in rows if (row["problem"], row["arm"], row["part"]) == wanted}
