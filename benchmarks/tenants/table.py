"""The table of what came out: scores over tenants beside the head alone, bytes, and times for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.statistics import over_seeds
from benchmarks.tables import kilobytes, points, table, text

LABELS = {
    "frozen": "the fitted head alone",
    "magnitude": "magnitude only, by the bank",
    "hyperadapt": "HyperAdapt",
    "lora_r1": "LoRA r=1",
    "structured_r64": "DVoRA r=64, by the bank",
    "dvora_r64": "DVoRA r=64, by the bank",
    "lora_r8": "LoRA r=8",
}
"""The arms, in the order of the table."""


def tenants(content: Mapping[str, Any]) -> str:
    """One line an arm that has been judged on the test rows."""
    rows, environment = content["rows"], content["environment"]
    finals, times = ({row["arm"]: row for row in rows if row["stage"] == stage} for stage in ("final", "times"))
    scores = {arm: 100 * np.array([*row["scores"].values()]) for arm, row in finals.items()}
    hours = sum(row.get("seconds", 0) for row in rows) / 3600
    head = ("", "test accuracy, %", "above the head alone", "above LoRA r=1", "kB of all, float16")
    return text(
        table(
            (*head, "training, times LoRA r=1", "serving, times the base"),
            [_line(arm, finals, times, scores) for arm in LABELS if arm in finals],
        ),
        f"Means and 95 % intervals over {len(scores['frozen'])} tenants, one seed, {hours:.1f} hours on a shared core "
        f"(`benchmarks/results/tenants.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU). "
        "Training: a step of every tenant, of eight at once in the bank, else one after another "
        f"({times['lora_r1']['training_seconds']:.1f} s with LoRA r=1). Serving: a batch with a row of each tenant. "
        "Both in float32, one thread, methods in turns, medians of ratios. Bytes: without heads.",
    )


def _line(
    arm: str,
    finals: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, np.ndarray],
) -> Sequence[str]:
    row, mean = finals[arm], over_seeds(scores[arm])
    first = [LABELS[arm], f"{mean.mean:.1f} ({mean.low:.1f} to {mean.high:.1f})"]
    if arm == "frozen":
        return [*first, "", "", "", "", ""]
    gains = scores[arm] - scores["frozen"]
    return [
        *first,
        f"{_above(gains)}; {(gains < 0).sum()} worse",
        "" if arm == "lora_r1" else _above(scores[arm] - scores["lora_r1"]),
        kilobytes(row["smallest_bytes"] * len(gains)),
        *(f"{times[arm][what][1]:.2f}" for what in ("training", "serving")),
    ]


def _above(differences: np.ndarray) -> str:
    return points(differences.mean(), over_seeds(differences))
