"""The table of LoRA in DVoRA's place: what the best low-rank approximations of trained adapters lose.

An adapter's W' - W rescales rows of W, which gives it W's own rank. Of all updates of rank k the one with the least
error of a layer's outputs has the k largest singular values of (W' - W) L, where L L^T is the second moment of its
inputs. The runs are over: what made the rows of `results/lora_approximation.json` is in git's history (`LOG.md` says
where).
"""

from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.quality.summary import NAMES

RANKS, UNWEIGHTED = (8, 16, 32, 64), (32,)
"""Of approximations that weigh inputs by their second moments, and of those that take them for white."""
ROWS = 256
"""Training rows that the second moments are of."""


def table(result: dict[str, Any]) -> str:
    """What is lost, by task and rank."""
    head = ("task", "base", "DVoRA", *(f"LoRA r={rank}" for rank in RANKS), f"r={UNWEIGHTED[0]}, without rows")
    rows = {row["task"]: row for row in result["rows"]}
    lines, lost, changes = [], [], []
    for task in (task for task in NAMES if task in rows):
        row, adapter = rows[task], rows[task]["adapter"]["score"]
        changes.append([100 * (each["score"] - adapter) for each in row["lora"]])
        scores = f"{100 * row['base']['score']:.1f}", f"{100 * adapter:.1f}"
        lines.append((NAMES[task], *scores, *(f"{change:+.1f}" for change in changes[-1])))
        lost += [each["lost"] for each in row["lora"] if each["weighted"] and each["rank"] == UNWEIGHTED[0]]
    lines.append(("mean", "", "", *(f"{change:+.1f}" for change in np.mean(changes, axis=0))))
    return tables.text(
        tables.table(head, lines),
        "Points on validation rows (accuracy; Pearson's correlation for ratings), and what they change by with LoRA in "
        f"the adapter's place: DVoRA r=64, structured, one seed, half of the steps of [Results](../results.md), second "
        f"moments of {ROWS} training rows (`benchmarks/results/lora_approximation.json`). At r={UNWEIGHTED[0]}, "
        f"{100 * min(lost):.0f} to {100 * max(lost):.0f} % of what the adapter adds to outputs is missing, on average "
        "over the layers.",
    )
