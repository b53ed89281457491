"""The verdict on a run, in plain sentences: is it better than a baseline, how sure is that, what to try."""

from collections.abc import Mapping
from math import isfinite
from statistics import fmean
from typing import Any

from ...text import shown
from .metrics import GREATER_IS_BETTER

HEAD_SAVED = "Saved: the head alone over the base, as an adapter that changes nothing else"
CHANGE = 0.02
"""Relative change of the training loss that counts as one."""
NEAR_ZERO = 0.05
"""A cross-entropy, or part of the first squared error, below which there is nothing left to learn from the rows."""


def verdict(
    metrics: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any] | None = None,
) -> list[str]:
    """What the metrics of a run, or of one evaluation, come to.

    Args:
        metrics: by part, and of what the part is compared with, as in run.json.
        comparisons: of what was trained with those, as in run.json.
        run: the record of a run that has just been trained, for advice where its validation rows show no gain.

    Returns:
        A sentence on each baseline that was not beaten, or by how much the best one was; and what to try. Nothing where
        no rows were held out.
    """
    part = next((part for part in ("test", "validation", *metrics) if part in metrics), None)
    if part is None:
        return []
    metric = next(name for name in GREATER_IS_BETTER if name in metrics[part])
    found = {
        key: _sentence(metric, part, metrics[part][metric], metrics[key], name, comparisons[key])
        for key, name in (
            (f"{part}_head_alone", "the head alone"),
            (f"{part}_before_training", "the base before training"),
            (f"{part}_simplest_guess", f"always {shown(metrics.get(f'{part}_simplest_guess', {}).get('guess'))}"),
        )
        if key in metrics and key in comparisons
    }
    unbeaten = [sentence for key, sentence in found.items() if comparisons[key]["outcome"] != "better"]
    on_validation = [by["outcome"] for key, by in comparisons.items() if key.startswith("validation_")]
    is_perfect = metrics.get("validation", {}).get(metric) == 1 and GREATER_IS_BETTER[metric]
    advice = [_advice(run)] if run is not None and {*on_validation} - {"better"} and not is_perfect else []
    return (unbeaten or [*found.values()][:1]) + advice


def _sentence(
    metric: str, part: str, trained: float, baseline: Mapping[str, Any], name: str, by: Mapping[str, Any]
) -> str:
    in_points = metric in ("accuracy", "f1")

    def amount(value: float, form: str = "") -> str:
        return f"{100 * value:{form}.1f}" if in_points else f"{value:{form}.3g}"

    gain, low, high, rows = by["gain"], by["low"], by["high"], by["rows"]
    points = " points" * in_points
    sure = "" if low is None else f", 95% interval {amount(low, '+')} to {amount(high, '+')}"
    values = f"{part} {metric} of {rows:,} {'row' if rows == 1 else 'rows'}: {trained:.4g} trained, "
    values += f"{baseline[metric]:.4g} {name}"
    if by["outcome"] == "better":
        return f"Better than {name} by {amount(gain)}{points}{sure} ({values})"
    if by["outcome"] == "no better":
        return f"NO BETTER than {name}: {amount(gain, '+')}{points}{sure} ({values})"
    about = "" if by["needed"] is None else f"{float(format(by['needed'], '.2g')):,.0f}"
    needed = about and f"; about {about} rows would be needed"
    return f"CANNOT TELL from {name}: {amount(gain, '+')}{points}{sure}{needed} ({values})"


def head_saved(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """That the head alone is what was saved, and why.

    Args:
        metrics: of the run, before what was trained was put back.
    """
    trained, head = metrics["validation"], metrics["validation_head_alone"]
    metric = next(name for name in GREATER_IS_BETTER if name in trained)
    return (
        f"{HEAD_SAVED}, as validation rows preferred it ({metric} {head[metric]:.4g}, {trained[metric]:.4g} trained"
        f"{', by its loss' if head[metric] == trained[metric] else ''}); --if-no-better adapter saves what was trained"
    )


def _advice(run: Mapping[str, Any]) -> str:
    """What to try, by what the training loss did."""
    losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
    if not losses:
        return "A head alone has nothing to tune: try an adapter, --method dvora, or more rows"
    steps, rate = run["steps"], run["settings"]["learning_rate"]
    fifth = max(1, len(losses) // 5)
    first, last = fmean(losses[:fifth]), fmean(losses[-fifth:])
    before = fmean(losses[-2 * fifth : -fifth] or losses)
    if not isfinite(last) or last > first:
        return f"The training loss rose ({first:.3g} to {last:.3g}): try a lower rate, --learning-rate {rate / 3:.2g}"
    if last < (NEAR_ZERO if run.get("labels") else NEAR_ZERO * first):
        return f"The training loss is near zero ({last:.3g}), so neither rates nor steps are what is missing: more rows"
    falls = last < (1 - CHANGE) * before
    if falls and run["best_step"] < steps:
        return (
            f"Validation was best at step {run['best_step']} of {steps} while the training loss fell on ({before:.3g} "
            f"to {last:.3g}): more steps would fit the training rows alone; try more rows, or a lower rate, "
            f"--learning-rate {rate / 3:.2g}"
        )
    if falls or run["best_step"] == steps:
        return (
            f"Train longer, such as --max-steps {2 * steps}: the training loss still fell at the end "
            f"({before:.3g} to {last:.3g})"
        )
    return (
        f"The training loss stood still at the end ({before:.3g} to {last:.3g}): try other rates, --learning-rate "
        f"{3 * rate:.2g} and {rate / 3:.2g}, or more rows"
    )
