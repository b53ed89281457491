"""The plot: losses on the left, changes of the weights on the right."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from demo.statistics import KINDS, LayerChange
from demo.train import History

# Steps in the running mean of the training loss.
WINDOW = 20
INK, PALE = "#222222", "#d9d9d9"
TRAINING, VALIDATION = "#0072b2", "#d55e00"
# Okabe and Ito's colours, which colour-blind readers can distinguish, and a marker each for print without colours.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7")
MARKERS = "os^Dvp"


def save_plot(history: History, changes: list[LayerChange], file: Path) -> None:
    """Draw the plot and save it as PNG."""
    figure = Figure(figsize=(11, 5), dpi=160, layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.25), wspace=0.04)[0]
    losses, accuracies = left.subplots(2, 1, sharex=True, height_ratios=(1.4, 1))
    _draw_losses(losses, history)
    _draw_accuracies(accuracies, history)
    magnitudes, angles = right.subplots(2, 1, sharex=True)
    _draw_changes(magnitudes, changes, "magnitude")
    _draw_changes(angles, changes, "angle")
    magnitudes.set_title("What training did to each layer", loc="left", fontsize=11, color=INK)
    magnitudes.set_ylabel("mean change of a\nrow's magnitude")
    magnitudes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    angles.set_ylabel("mean turn of a\nrow's direction")
    angles.yaxis.set_major_formatter("{x:g}°")
    angles.set_xlabel("transformer layer")
    angles.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, names = magnitudes.get_legend_handles_labels()
    right.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(file)


def _draw_losses(axes: Axes, history: History) -> None:
    steps = np.arange(1, len(history.steps) + 1)
    width = min(WINDOW, len(steps))
    running = np.convolve(history.steps, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], running, color=TRAINING, linewidth=2, label=f"training, mean of {width} batches")
    at, checked, _ = zip(*history.checks, strict=True)
    axes.plot(at, checked, "o-", color=VALIDATION, linewidth=2, markersize=5, label="validation")
    axes.set_title("Learning to tell good reviews from bad", loc="left", fontsize=11, color=INK)
    axes.set_ylabel("cross-entropy")
    axes.margins(x=0.08, y=0.12)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    _tidy(axes)


def _draw_accuracies(axes: Axes, history: History) -> None:
    at, _, shares = zip(*history.checks, strict=True)
    axes.axhline(shares[0], color=INK, linewidth=1, linestyle=":")
    axes.annotate("frozen model", (at[-1], shares[0]), (0, 3), textcoords="offset points", ha="right", fontsize=9)
    axes.plot(at, shares, "o-", color=VALIDATION, linewidth=2, markersize=5)
    for step, share in zip(at, shares, strict=True):
        axes.annotate(f"{share:.1%}", (step, share), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.margins(y=0.25)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("training step")
    axes.set_ylabel("validation\naccuracy")
    _tidy(axes)


def _draw_changes(axes: Axes, changes: list[LayerChange], what: str) -> None:
    for kind, colour, marker in zip(KINDS.values(), COLOURS, MARKERS, strict=True):
        chosen = [change for change in changes if change.kind == kind]
        numbers = [change.layer + 1 for change in chosen]
        values = [change.magnitude if what == "magnitude" else change.angle for change in chosen]
        axes.plot(numbers, values, marker=marker, color=colour, linewidth=1.5, markersize=5, label=kind)
    axes.set_ylim(bottom=0)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
