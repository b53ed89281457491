"""Pictures of a run: its curves, and its predictions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ...tools.pages.pictures import COLOURS, axes_of, label, new_figure, svg


def curves(history: Sequence[Mapping[str, Any]], best_step: int) -> Markup | None:
    """Training loss (each step, and smoothed) and validation metrics; None without a loss on record."""
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    names = [name for entry in history for name in entry if name.startswith("eval_") and name != "eval_loss"]
    # A single evaluation is a number in a table, no curve.
    shown = next((name for name in names if names.count(name) > 1), None)
    if not losses:
        return None
    figure = new_figure(5, 4.6 if shown else 2.9)
    upper, *lower = axes_of(figure, 2 if shown else 1)
    steps, values = zip(*losses, strict=True)
    upper.plot(steps, values, color=COLOURS[0], alpha=0.3, linewidth=0.8)
    upper.plot(steps, _smoothed(values), color=COLOURS[0], label="training")
    checked = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if checked:
        upper.plot(*zip(*checked, strict=True), marker="o", markersize=4, color=COLOURS[1], label="validation")
    upper.set(ylabel="loss", xlabel="step")
    upper.legend(frameon=False)
    if lower and shown:
        points = [(entry["step"], entry[shown]) for entry in history if shown in entry]
        lower[0].plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[1])
        lower[0].set(xlabel="step", ylabel=label(f"validation {shown.removeprefix('eval_').replace('_', ' ')}"))
    for axes in (upper, *lower):
        axes.locator_params(axis="x", integer=True)
        axes.axvline(best_step, color="#8a8a8a", linewidth=1, linestyle=":")
    return svg(figure, "Loss and validation metrics along the steps; a dotted line at the step that was kept")


def numbers(pairs: Sequence[tuple[float, float]]) -> Markup:
    """Predicted against true numbers."""
    figure = new_figure(4.2, 3.8)
    (axes,) = axes_of(figure)
    true, predicted = zip(*pairs, strict=True)
    axes.plot(true, predicted, ".", color=COLOURS[0], alpha=0.5)
    ends = [min(*true, *predicted), max(*true, *predicted)]
    axes.plot(ends, ends, color="#8a8a8a", linewidth=1, linestyle=":")
    axes.set(xlabel="true", ylabel="predicted")
    return svg(figure, "Predicted against true numbers")


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Exponential moving averages, without the bias of their start."""
    weight = min(0.95, 1 - 1 / max(2, len(values) / 15))
    mean, smooth = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**count))
    return np.array(smooth)
