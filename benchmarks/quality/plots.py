"""Pictures of the result file, one for each question.

Run from the repository's root: python -m benchmarks.quality.plots [RESULT]
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.results import RESULT
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import (
    ARMS,
    CHOICES,
    EQUAL_VALUES,
    LABELS,
    QUANTISED,
    SEEDS,
    Result,
    result_of,
)
from benchmarks.quality.tables import MODELS

FOLDER = Path(__file__).parent.parent.parent / "docs" / "pictures"
COLOURS = {
    "frozen": "0.6",
    "tfidf": "0.75",
    "full": "0.2",
    "lora_r8": "tab:green",
    "lora_r1": "yellowgreen",
    "dora_r8": "tab:red",
    "vera": "tab:orange",
    "ia3": "tab:brown",
    "bitfit": "tab:olive",
    "magnitude": "tab:cyan",
    "dvora": "tab:blue",
    "dvora_structured": "tab:purple",
}


def methods(result: Result) -> Figure:
    """Question 1: how much better than VeRA each method is, on each task."""
    tasks, arms = result.tasks("methods"), [arm for arm in COLOURS if arm not in ("vera", "tfidf")]
    figure, rows = plt.subplots(1, len(tasks), figsize=(2.6 * len(tasks) + 1.6, 4.2), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        _differences(axes, result, task, {arm: ARMS[arm] for arm in arms}, "vera")
    figure.suptitle("Better than VeRA r=256 by so much on test (95 % interval over seeds and items)", fontsize="medium")
    return figure


def equal_values(result: Result) -> Figure:
    """Question 1: arms with about as many trained values as DVoRA at rank 256, and those with half of them."""
    tasks = result.tasks("equal_values")
    figure, rows = plt.subplots(1, len(tasks), figsize=(2.9 * len(tasks) + 2.2, 2.9), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        values = {
            arm: f"{label}: {result.size(task, arm, 'trained_values') or 0:,}" for arm, label in EQUAL_VALUES.items()
        }
        _differences(axes, result, task, values if len(tasks) == 1 else EQUAL_VALUES, "dvora")
    figure.suptitle("Better (right) or worse than DVoRA r=256 at about its number of values", fontsize="medium")
    return figure


def ranks(result: Result) -> Figure:
    """Question 2: better than dense matrices of rank 256 by how much, against the rank."""
    tasks = result.tasks("ranks")
    figure, rows = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        for place, (arm, by_rank) in enumerate(_BY_RANK.items()):
            gains = {rank: gain for rank, name in by_rank.items() if (gain := result.gain(task, name, "dvora"))}
            at = [rank * (0.97 + 0.06 * place) for rank in gains]
            _line(axes, at, list(gains.values()), ARMS[arm].split(", ")[1], COLOURS[arm])
        if vera := result.gain(task, "vera", "dvora"):
            axes.axhline(vera.mean, color=COLOURS["vera"], linestyle="--", label="VeRA r=256")
        axes.set(xscale="log", xlabel="rank")
        axes.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1,024"])
        axes.minorticks_off()
        axes.set_title(LABELS[task], fontsize="medium")
    np.atleast_1d(rows)[0].set_ylabel("difference to dense r=256")
    np.atleast_1d(rows)[0].legend(frameon=False, fontsize="small")
    return figure


_BY_RANK = {
    "dvora": {16: "dvora_r16", 64: "dvora_r64", 256: "dvora", 1024: "dvora_r1024"},
    "dvora_structured": {16: "structured_r16", 64: "structured_r64", 256: "dvora_structured", 1024: "structured_r1024"},
}


def choices(result: Result) -> Figure:
    """Question 3: what each choice in the method is worth."""
    tasks = result.tasks("choices")
    figure, rows = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks) + 2.4, 5.2), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        _differences(axes, result, task, CHOICES, "dvora")
    figure.suptitle("Better (right) or worse than the default, dense DVoRA r=256", fontsize="medium")
    return figure


def rates(result: Result) -> Figure:
    """Question 4: validation loss against the adapter's learning rate."""
    tasks = result.tuned_tasks()
    columns = max(1, min(3, len(tasks)))
    lines = -(-len(tasks) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.4 * lines), layout="constrained", squeeze=False
    )
    for axes, task in zip(grid.flat, tasks, strict=False):
        for arm in COLOURS:
            if points := result.trials(task, arm):
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[arm], label=ARMS[arm])
        axes.set(xscale="log", xlabel="adapter's learning rate", ylabel="validation loss")
        best = min(loss for arm in COLOURS for _, loss in result.trials(task, arm))
        start = result.start_loss(task)
        axes.set_ylim(best - 0.1 * (start - best), start + 0.6 * (start - best))
        axes.axhline(start, color="0.6", linewidth=1)
        axes.set_title(LABELS[task].split(",")[0], fontsize="medium")
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    _legend_above(figure, grid.flat[0])
    return figure


def quantised(result: Result) -> Figure:
    """Question 5: every method on a quantised base and on the float32 base, beside DVoRA on the latter."""
    tasks = result.tasks("quantised")
    figure, rows = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks) + 1.4, 3.4), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        _differences(axes, result, task, QUANTISED, "dvora")
        axes.set_xlabel("difference to DVoRA r=256 on float32")
    return figure


def seeds(result: Result) -> Figure:
    """Question 6: test scores over shared matrices, and over orders of the batches."""
    tasks = result.tasks("seeds")
    figure, rows = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 2.8), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(rows), tasks, strict=True):
        for place, (arm, (_, first)) in enumerate(SEEDS.items()):
            scores = [row["test"]["score"] for row in result.finals(task, arm).values()]
            scores += [row["test"]["score"] for seed, row in result.finals(task, first).items() if seed == 0]
            axes.plot(np.array(scores) * 100, [place] * len(scores), "o", color=COLOURS[first], alpha=0.7)
        axes.set_yticks(range(len(SEEDS)), [label for label, _ in SEEDS.values()])
        axes.set_title(LABELS[task], fontsize="medium")
        axes.grid(axis="x", color="0.92")
        axes.margins(y=0.3)
    np.atleast_1d(rows)[0].invert_yaxis()
    return figure


def pareto(result: Result) -> Figure:
    """Question 7: gain over the frozen base against trained values, bytes and time, one line of panels a model."""
    tasks = [task for task in MODELS.values() if task in result.tasks("pareto")]
    figure, grid = plt.subplots(
        len(tasks), 3, figsize=(11, 2.9 * len(tasks)), layout="constrained", squeeze=False, sharey="row"
    )
    for line, task in zip(grid, tasks, strict=True):
        for axes, (what, label) in zip(line, _COSTS.items(), strict=True):
            for arm in COLOURS:
                gain, cost = result.gain(task, arm, "frozen"), _cost(result, task, arm, what)
                if gain and cost:
                    axes.errorbar(
                        [cost],
                        [gain.mean],
                        yerr=[[gain.mean - gain.low], [gain.high - gain.mean]],
                        fmt="o",
                        color=COLOURS[arm],
                        label=ARMS[arm],
                    )
            axes.set(xscale="log", xlabel=label)
            axes.grid(color="0.92")
        line[0].set_ylabel(f"{LABELS[task]}\ngain over the frozen base", fontsize="small")
    _legend_above(figure, grid[0][0])
    return figure


_COSTS = {
    "trained_values": "trained values, without the head",
    "saved_bytes": "bytes of the adapter's file",
    "seconds_per_step": "time of a step, s",
}


def _cost(result: Result, task: str, arm: str, what: str) -> float | None:
    if what != "seconds_per_step":
        return result.size(task, arm, what)
    return result.step(task, arm)


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize="small")


def _differences(axes: Axes, result: Result, task: str, arms: Mapping[str, str], over: str) -> None:
    for place, arm in enumerate(arms):
        if gain := result.gain(task, arm, over):
            _dot(axes, place, gain, COLOURS.get(arm, "tab:blue" if gain.excludes_zero else "0.6"))
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(range(len(arms)), list(arms.values()))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(LABELS[task].replace(", ", "\n"), fontsize="medium")


def _dot(axes: Axes, place: float, figure: Interval, colour: str) -> None:
    sides = [[figure.mean - figure.low], [figure.high - figure.mean]]
    axes.errorbar([figure.mean], [place], xerr=sides, fmt="o", color=colour, capsize=2, markersize=5)


def _line(axes: Axes, at: Sequence[float], figures: Sequence[Interval], label: str, colour: str) -> None:
    sides = [[f.mean - f.low for f in figures], [f.high - f.mean for f in figures]]
    axes.errorbar(at, [f.mean for f in figures], yerr=sides, marker="o", capsize=2, label=label, color=colour)


PICTURES: dict[str, Callable[[Result], Figure]] = {
    "methods": methods,
    "equal_values": equal_values,
    "ranks": ranks,
    "choices": choices,
    "rates": rates,
    "quantised": quantised,
    "seeds": seeds,
    "pareto": pareto,
}


def main() -> None:
    """Draw every picture for which there are rows."""
    content: dict[str, Any] = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULT).read_text(encoding="utf-8"))
    result = result_of(content)
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        if result.tasks(name):
            figure = draw(result)
            figure.savefig(FOLDER / f"{name}.png", dpi=110)
            plt.close(figure)


if __name__ == "__main__":
    main()
