"""The table of many small users: how much lower a user's loss is with an adapter of its own.

The runs are over: what made the rows of `results/users.json` is in git's history (`LOG.md` says where).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.page import LABELS, YARDSTICK
from benchmarks.quality.statistics import over_seeds
from benchmarks.tables import kilobytes, points, table, text

EXAMPLES = (8, 32)
"""Rows of a user that are trained on."""
ARMS = ("structured_r64", "magnitude", "vera_r256", "lora_r1", "lora_r8")
KINDS: Mapping[str, str] = {"speakers": "Shakespeare's characters", "languages": "programming languages"}
"""The users of the table, by the names of their sources."""


def users(content: Mapping[str, Any]) -> str:
    """One row an arm: how much lower a user's loss is than with LoRA r=1, and for how many it is above the base's."""
    rows, environment = content["rows"], content["environment"]
    settings = [(source, examples) for source in KINDS for examples in EXAMPLES]
    lines = []
    for arm in ARMS:
        size = next(row["smallest_bytes"] for row in rows if row["arm"] == arm and "smallest_bytes" in row)
        lines.append([LABELS[arm], kilobytes(size), *(_cell(rows, source, count, arm) for source, count in settings)])
    hours = sum(row["seconds"] for row in rows) / 3600
    counts = max(len(row["losses"]) for row in rows if row["part"] == "test")
    return text(
        table(["", "kB, float16", *(f"{KINDS[source]}, {count} rows each" for source, count in settings)], lines),
        "Nats a token below LoRA r=1 (95 % intervals over users; for LoRA r=1 itself, below the base), and how "
        f"many of the {counts} users are worse off than without an adapter. Rows of 48 tokens; {hours:.1f} hours "
        f"of one core (`benchmarks/results/users.json`; torch {environment['torch']}, PEFT "
        f"{environment['peft']}, CPU).",
    )


def _cell(rows: Sequence[Mapping[str, Any]], source: str, examples: int, arm: str) -> str:
    below_base = _differences(rows, source, examples, arm, "base")
    against = below_base if arm == YARDSTICK else _differences(rows, source, examples, arm, YARDSTICK)
    gain = over_seeds(against)
    return f"{points(gain.mean, gain, 3)}; {(below_base < 0).sum()} worse"


def _differences(rows: Sequence[Mapping[str, Any]], source: str, examples: int, arm: str, over: str) -> np.ndarray:
    """How much lower each user's loss is than with another arm, or with the base, as a mean over the seeds of both."""
    ours, theirs = (
        {
            row["seed"]: row["losses"]
            for row in rows
            if _is_of(row, source, each, 0 if each == "base" else examples, "test")
        }
        for each in (arm, over)
    )
    if over == "base":
        theirs = dict.fromkeys(ours, theirs[0])
    of_seeds = [np.array(theirs[seed]) - np.array(ours[seed]) for seed in sorted(set(ours) & set(theirs))]
    return np.asarray(np.mean(of_seeds, axis=0))


def _is_of(row: Mapping[str, Any], source: str, arm: str, examples: int, part: str) -> bool:
    return (row["source"], row["arm"], row["examples"], row["part"]) == (source, arm, examples, part)
