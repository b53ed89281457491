"""The verdict on a run, in plain sentences: whether it beats what it is compared with, and what to try if not."""

from collections.abc import Mapping
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

from ...text import shown
from .metrics import GREATER_IS_BETTER

HEAD_SAVED = (
    "Saved: the head alone over the base, as an adapter that changes nothing else; --if-no-better adapter saves what "
    "was trained"
)
CHANGE = 0.02
"""Relative change of the training loss that counts as one."""


def verdict(
    metrics: Mapping[str, Mapping[str, Any]], rows: Mapping[str, int], run: Mapping[str, Any] | None = None
) -> list[str]:
    """What the metrics of a run, or of one evaluation, come to.

    Args:
        metrics: by part, and of what the part is compared with, as in run.json.
        rows: of each part.
        run: the record of a run that has just been trained, for advice where the result is a failure.

    Returns:
        Every baseline that is as good, and what to try; else by how much the best baseline was beaten. Nothing where
        no rows were held out.
    """
    part = _judged_on(metrics)
    if part is None:
        return []
    trained = metrics[part]
    metric = next(name for name in GREATER_IS_BETTER if name in trained)
    compared = [
        _compared(metric, part, trained[metric], metrics[key], name, rows.get(part, 0))
        for key, name in (
            (f"{part}_head_alone", "the head alone"),
            (f"{part}_before_training", "the base before training"),
            (f"{part}_simplest_guess", f"always {shown(metrics.get(f'{part}_simplest_guess', {}).get('guess'))}"),
        )
        if key in metrics
    ]
    failures = [sentence for sentence, is_better in compared if not is_better]
    if failures:
        return failures + ([_advice(run)] if run is not None else [])
    return [sentence for sentence, _ in compared[:1]]


def beats_head_alone(metrics: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether what was trained is better than the head alone, in the metric and on the rows of the verdict.

    Also true where there is nothing to tell it from.
    """
    part = _judged_on(metrics)
    if part is None or f"{part}_head_alone" not in metrics:
        return True
    metric = next(name for name in GREATER_IS_BETTER if name in metrics[part])
    return _compared(metric, part, metrics[part][metric], metrics[f"{part}_head_alone"], "", 0)[1]


def _judged_on(metrics: Mapping[str, Mapping[str, Any]]) -> str | None:
    return next((part for part in ("test", "validation", *metrics) if part in metrics), None)


def _compared(
    metric: str, part: str, trained: float, baseline: Mapping[str, Any], name: str, rows: int
) -> tuple[str, bool]:
    """A sentence on one baseline, and whether the trained model is better than it."""
    other = float(baseline[metric])
    gain = trained - other if GREATER_IS_BETTER[metric] else other - trained
    values = f"{part} {metric}: {trained:.4g} trained, {other:.4g} {name}"
    if not gain > 0:
        return f"NO BETTER than {name} ({values})", False
    # That of a share of independent rows; two models on the same rows differ by less.
    error = sqrt(trained * (1 - trained) / rows) if metric == "accuracy" and rows else 0.0
    by = f"{100 * gain:.1f} points" if metric == "accuracy" else f"{gain:.3g}"
    chance = f", which {rows:,} rows cannot tell from chance" if gain < error else ""
    return f"Better than {name} by {by}{chance} ({values})", True


def _advice(run: Mapping[str, Any]) -> str:
    """What to try, by what the training loss did."""
    losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
    steps, rate = run["steps"], run["settings"]["learning_rate"]
    fifth = max(1, len(losses) // 5)
    first, last = fmean(losses[:fifth]), fmean(losses[-fifth:])
    before = fmean(losses[-2 * fifth : -fifth] or losses)
    if not isfinite(last) or last > first:
        return f"The training loss rose ({first:.3g} to {last:.3g}): try a lower rate, --learning-rate {rate / 3:.2g}"
    if last < (1 - CHANGE) * before or run["best_step"] == steps:
        return (
            f"Train longer, such as --max-steps {2 * steps}: the training loss still fell at the end "
            f"({before:.3g} to {last:.3g})"
        )
    return (
        f"The training loss stood still at the end ({before:.3g} to {last:.3g}): try other rates, --learning-rate "
        f"{3 * rate:.2g} and {rate / 3:.2g}, or more rows"
    )
