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
    "lora_r8": "LoRA r=8",
}
"""The arms, in the order of the table."""


def tenants(content: Mapping[str, Any]) -> str:
    """One row an arm that has been judged on the test rows; seeds are averaged tenant by tenant."""
    rows: Sequence[Mapping[str, Any]] = content["rows"]
    finals = {arm: [row for row in rows if (row["arm"], row["stage"]) == (arm, "final")] for arm in LABELS}
    lines = []
    for arm, label in LABELS.items():
        if not finals[arm]:
            continue
        scores, gains = _scores(finals[arm]), _scores(finals[arm]) - _scores(finals["frozen"])
        mean, gain = over_seeds(scores), over_seeds(gains)
        line = [label, f"{mean.mean:.1f} ({mean.low:.1f} to {mean.high:.1f})"]
        if arm == "frozen":
            lines.append([*line, "", "", "", "", ""])
            continue
        first = finals[arm][0]
        above = _scores(finals[arm]) - _scores(finals["lora_r1"]) if finals["lora_r1"] else None
        lines.append(
            [
                *line,
                f"{points(gain.mean, gain)}; {(gains < 0).sum()} worse",
                "" if arm == "lora_r1" or above is None else points(above.mean(), over_seeds(above)),
                kilobytes(first["smallest_bytes"] * len(first["scores"])),
                f"{np.median([row['training_seconds'] for row in finals[arm]]):.0f}",
                f"{np.median([row['serving'][1] for row in finals[arm]]):.2f}",
            ]
        )
    some, environment = finals["frozen"][0], content["environment"]
    seeds = len({row["seed"] for arm in LABELS for row in finals[arm]})
    head = ("", "test accuracy, %", "above the head alone", "above LoRA r=1", "kB of all, float16")
    return text(
        table((*head, "training all, s", "serving, times the base"), lines),
        f"Means over {len(some['scores'])} tenants with 95 % intervals over them, {seeds} seed{'s' * (seeds > 1)}, "
        f"{sum(row['seconds'] for row in rows) / 3600:.1f} hours on a core shared with other work (`benchmarks/results/tenants.json`; torch "
        f"{environment['torch']}, PEFT {environment['peft']}, CPU). Training: the processor's seconds in one thread, "
        "in bfloat16. Serving: a batch with a row of each tenant, beside the frozen base's, in turns, medians, in "
        "float32. Bytes are without heads, which all have.",
    )


def _scores(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """In percent, of each tenant, means over the seeds."""
    return 100 * np.mean([[*row["scores"].values()] for row in rows], axis=0)
