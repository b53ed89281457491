"""Two models on the same rows: which is better, by how much, and how sure that is.

A row gives a few numbers, whose sums over rows give the metric, so that pairs of rows can be drawn again and again.

Dimensions: N rows, K numbers of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import ceil, isfinite, sqrt
from typing import Any

import numpy as np
from scipy import stats

from ...tensors import Float
from .metrics import GREATER_IS_BETTER

METRICS: Mapping[str, Callable[[Any], Any]] = {
    "accuracy": lambda sums: sums[..., 0] / sums[..., 1],
    "f1": lambda sums: 2 * sums[..., 0] / np.maximum(1, sums[..., 1] + sums[..., 2]),
    "rmse": lambda sums: np.sqrt(sums[..., 0] / sums[..., 1]),
    "loss": lambda sums: sums[..., 0] / sums[..., 1],
}
"""Metrics, of sums over rows: (right, 1, loss); (right, guessed, true entities); (squared error, 1); (loss, tokens)."""
CONFIDENCE, POWER = 0.95, 0.8
BOUND = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
MATTERS = 0.01
"""What a share has to be better by, and a loss or an error as a part of it, for a difference that nobody may miss."""
RESAMPLES, SEED = 4000, 0
MOST_DRAWN = 2**22
"""Row numbers that are drawn at a time."""


@dataclass(frozen=True)
class Comparison:
    """How much better one model is than another on the same rows.

    Args:
        gain: difference of the metric, positive where the first is better.
        low, high: ends of its 95 % interval; None where there is none.
        rows: that were compared.
        needed: rows that would tell such a gain, or one that matters, from chance, in four cases of five.
        outcome: "better" if the whole interval is above zero, "no better" if it is below a gain that matters, else
            "cannot tell".
    """

    gain: float
    low: float | None
    high: float | None
    rows: int
    needed: int | None
    outcome: str


def compared(metric: str, first: Float[np.ndarray, "N K"], second: Float[np.ndarray, "N K"]) -> Comparison:
    """Compare two models by a metric, one of `METRICS`, of which each gave the numbers of the same rows.

    Shares of right rows: the interval of Bonett and Price (2012) for paired shares, which is stretched to zero where
    the exact sign test of the rows that differ (McNemar's) is not significant. Others: the percentiles of a paired
    bootstrap over rows, wider by what few rows make them too narrow (Hesterberg, 2015).
    """
    of, sign = METRICS[metric], 1 if GREATER_IS_BETTER[metric] else -1
    trained, other = float(of(first.sum(0))), float(of(second.sum(0)))
    gain, rows = sign * (trained - other), len(first)
    if not isfinite(gain):
        return Comparison(gain, None, None, rows, None, "cannot tell" if isfinite(trained) else "no better")
    if metric == "accuracy":
        low, high, differing = _of_shares(first[:, 0] - second[:, 0])
    elif rows > 1:
        low, high, differing = *_of_resampled(of, sign, first, second), 1.0
    else:
        return Comparison(gain, None, None, rows, None, "cannot tell")
    matters = MATTERS if GREATER_IS_BETTER[metric] else MATTERS * abs(other)
    error = (high - low) / 2 * (1 + stats.norm.ppf(POWER) / BOUND)
    # The sign test needs six rows that differ.
    needed = max(ceil(rows * (error / max(abs(gain), matters, 1e-12)) ** 2), ceil(6 / differing))
    outcome = "better" if low > 0 else "no better" if high < matters else "cannot tell"
    return Comparison(gain, low, high, rows, needed, outcome)


def _of_shares(signs: Float[np.ndarray, "N"]) -> tuple[float, float, float]:
    """The interval, and the share of rows that differ."""
    wins, losses, rows = int((signs > 0).sum()), int((signs < 0).sum()), len(signs) + 2
    up, down = (wins + 1) / rows, (losses + 1) / rows
    width = BOUND * sqrt((up + down - (up - down) ** 2) / rows)
    low, high = max(-1.0, up - down - width), min(1.0, up - down + width)
    if stats.binomtest(wins, max(1, wins + losses)).pvalue > 1 - CONFIDENCE:
        low, high = min(low, 0.0), max(high, 0.0)
    return low, high, up + down


def _of_resampled(of: Callable[[Any], Any], sign: int, first: Any, second: Any) -> tuple[float, float]:
    rows, random = len(first), np.random.default_rng(SEED)
    at_once = max(1, MOST_DRAWN // rows)
    gains = []
    for start in range(0, RESAMPLES, at_once):
        drawn = random.integers(rows, size=(min(at_once, RESAMPLES - start), rows))
        gains.append(sign * (of(first[drawn].sum(1)) - of(second[drawn].sum(1))))
    tail = stats.norm.cdf(sqrt(rows / (rows - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, rows - 1))
    low, high = np.quantile(np.concatenate(gains), [tail, 1 - tail])
    return float(low), float(high)


def comparisons(metric: str, rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each baseline of a part compared with what was trained, by its key, for run.json.

    Args:
        metric: the task's.
        rows: numbers of rows by the keys of the metrics in run.json: "test", "test_head_alone".
    """
    parts = {key: key.partition("_")[0] for key in rows}
    return {key: asdict(compared(metric, rows[part], rows[key])) for key, part in parts.items() if key != part}


def is_preferred(metric: str, rows: Mapping[str, Any]) -> bool:
    """Whether the validation rows prefer what was trained to the head alone: by the metric, where equal by the loss.

    Test rows are never asked. Also true where there is nothing to compare. Arguments as for `comparisons`.
    """
    trained, head = rows.get("validation"), rows.get("validation_head_alone")
    if trained is None or head is None:
        return True
    gain = compared(metric, trained, head).gain
    if metric == "accuracy" and gain == 0:
        gain = float((head - trained)[:, 2].sum())
    return gain > 0
