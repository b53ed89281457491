"""Which jobs there are, and the table of what came out: four rates of each method, then the best with every seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.quality.grid import one_more
from benchmarks.quality.page import LABELS, YARDSTICK
from benchmarks.quality.statistics import over_seeds
from benchmarks.tables import kilobytes, points, table, text

EXAMPLES = (8, 32)
"""Rows of a user that are trained on."""
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES: Mapping[str, tuple[float, ...]] = {
    "structured_r64": (0.01, 0.03, 0.09),
    "magnitude": (0.01, 0.03, 0.09),
    "vera_r256": (0.01, 0.03, 0.09),
    "lora_r1": (0.001, 0.003, 0.009),
    "lora_r8": (0.0007, 0.002, 0.006),
}
"""Rates that are tried first, by the methods' names in the result file."""
KINDS: Mapping[str, str] = {"speakers": "Shakespeare's characters", "languages": "programming languages"}
"""The users of the table, by the names of their sources."""

Rows = Mapping[str, Mapping[str, Any]]
"""By their keys."""


@dataclass(frozen=True)
class Job:
    """An adapter for each user of a source.

    Args:
        arm: of `RATES`, or "base", which has no adapter.
        part: whose loss is measured, "development" while rates are tuned, or "test".
    """

    source: str
    arm: str
    rate: float
    examples: int
    seed: int
    part: str

    @property
    def key(self) -> str:
        """Identifies the job."""
        settings = f"examples {self.examples} seed {self.seed} rate {self.rate:.3g}"
        return f"{self.source} {self.arm} {self.part} {settings}"


def waiting(rows: Rows, sources: Sequence[str], examples: Sequence[int], arms: Sequence[str]) -> Iterator[Job]:
    """Jobs that can start now, the most important first; those that have a row already are among them."""
    every = [(source, count, arm) for source in sources for count in examples for arm in arms]
    for source, count, arm in every:
        yield from (
            Job(source, arm, rate, count, TUNING_SEED, "development") for rate in rates(rows, source, count, arm)
        )
    yield from (Job(source, "base", 0, 0, 0, "test") for source in sources)
    for seed in SEEDS:
        for source, count, arm in every:
            tried = trials(rows, source, count, arm)
            if len(tried) > len(RATES[arm]):
                yield Job(source, arm, min(tried, key=tried.__getitem__), count, seed, "test")


def rates(rows: Rows, source: str, examples: int, arm: str) -> list[float]:
    """The rates to try: three of the arm's, then one more, beyond the best at an edge, else beside it."""
    tried = trials(rows, source, examples, arm)
    if len(tried) == len(RATES[arm]):
        return [*RATES[arm], one_more(tried, 3**0.5)]
    return list(RATES[arm])


def trials(rows: Rows, source: str, examples: int, arm: str) -> Mapping[float, float]:
    """Mean losses by rate."""
    found = (row for row in rows.values() if _is_of(row, source, arm, examples, "development"))
    return {row["rate"]: mean(row["losses"]) for row in found}


def said(row: Mapping[str, Any]) -> str:
    """What came out of a job, in a few words."""
    return f"{mean(row['losses']):.4f}"


def users(content: Mapping[str, Any]) -> str:
    """One row an arm: how much lower a user's loss is than with LoRA r=1, and for how many it is above the base's."""
    rows, environment = content["rows"], content["environment"]
    settings = [(source, examples) for source in KINDS for examples in EXAMPLES]
    lines = []
    for arm in RATES:
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
