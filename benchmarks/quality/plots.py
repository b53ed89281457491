"""Pictures of the result file, one for each question.

Run from the repository's root: python -m benchmarks.quality.plots [RESULT]
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pictures import FAINT, METHODS, WIDTH, save
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
    name_of,
    result_of,
)
from benchmarks.quality.tables import MODELS

COLOURS = {
    "frozen": METHODS["frozen base"],
    "full": METHODS["full fine-tuning"],
    "lora_r8": METHODS["LoRA"],
    "lora_r1": METHODS["LoRA r=1"],
    "dora_r8": METHODS["DoRA"],
    "vera": METHODS["VeRA"],
    "ia3": METHODS["(IA)3"],
    "bitfit": METHODS["BitFit"],
    "magnitude": METHODS["magnitude only"],
    "dvora": METHODS["DVoRA"],
    "dvora_structured": METHODS["DVoRA, structured"],
}


def methods(result: Result) -> Figure:
    """Question 1: how much better than VeRA each method is, on each task."""
    tasks, arms = result.tasks("methods"), [arm for arm in COLOURS if arm != "vera"]
    figure, panels = _panels(tasks, columns=3, height=2.5, sharey=True)
    for axes, task in panels.items():
        _differences(axes, result, task, {arm: ARMS[arm] for arm in arms}, "vera")
    figure.suptitle("Better than VeRA r=256 by so much on test (95 % interval over seeds and items)", fontsize="medium")
    return figure


def equal_values(result: Result) -> Figure:
    """Question 1: arms with about as many trained parameters as DVoRA at rank 256, and arms with half as many."""
    tasks = result.tasks("equal_values")
    figure, panels = _panels(tasks, columns=2, height=2.6, sharey=True)
    for axes, task in panels.items():
        labels = {
            arm: f"{label}: {result.size(task, arm, 'trained_values') or 0:,}" for arm, label in EQUAL_VALUES.items()
        }
        _differences(axes, result, task, labels if len(tasks) == 1 else EQUAL_VALUES, "dvora")
    figure.suptitle("Better (right) or worse than DVoRA r=256 at about its number of parameters", fontsize="medium")
    return figure


def ranks(result: Result) -> Figure:
    """Question 2: better than dense matrices of rank 256 by how much, against the rank."""
    figure, panels = _panels(result.tasks("ranks"), columns=2, height=2.9)
    for axes, task in panels.items():
        for place, (arm, by_rank) in enumerate(_BY_RANK.items()):
            gains = {rank: gain for rank, name in by_rank.items() if (gain := result.gain(task, name, "dvora"))}
            at = [rank * (0.97 + 0.06 * place) for rank in gains]
            _line(axes, at, list(gains.values()), ARMS[arm].split(", ")[1], COLOURS[arm])
        if vera := result.gain(task, "vera", "dvora"):
            axes.axhline(vera.mean, color=COLOURS["vera"], linestyle="--", label="VeRA r=256")
        axes.set(xscale="log", xlabel="rank", ylabel="difference to dense r=256")
        axes.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1,024"])
        axes.minorticks_off()
        axes.set_title(LABELS[task], fontsize="medium")
        axes.legend(fontsize="small")
    return figure


_BY_RANK = {
    "dvora": {16: "dvora_r16", 64: "dvora_r64", 256: "dvora", 1024: "dvora_r1024"},
    "dvora_structured": {16: "structured_r16", 64: "structured_r64", 256: "dvora_structured", 1024: "structured_r1024"},
}


def choices(result: Result) -> Figure:
    """Question 3: what each choice in the method is worth."""
    figure, panels = _panels(result.tasks("choices"), columns=2, height=4.8, sharey=True)
    for axes, task in panels.items():
        _differences(axes, result, task, CHOICES, "dvora")
    figure.suptitle("Better (right) or worse than the default, dense DVoRA r=256", fontsize="medium")
    return figure


def rates(result: Result) -> Figure:
    """Question 4: validation loss against the adapter's learning rate."""
    figure, panels = _panels(result.tuned_tasks(), columns=2, height=2.5)
    for axes, task in panels.items():
        for arm in COLOURS:
            if points := result.trials(task, arm):
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[arm], label=ARMS[arm])
        axes.set(xscale="log", xlabel="adapter's learning rate", ylabel="validation loss")
        best = min(loss for arm in COLOURS for _, loss in result.trials(task, arm))
        start = result.start_loss(task)
        axes.set_ylim(best - 0.1 * (start - best), start + 0.6 * (start - best))
        axes.axhline(start, color=FAINT, linewidth=1)
        axes.set_title(name_of(task), fontsize="medium")
    _legend_above(figure, next(iter(panels)))
    return figure


def quantised(result: Result) -> Figure:
    """Question 5: every method on a quantised base and on the float32 base, beside DVoRA on the latter."""
    figure, panels = _panels(result.tasks("quantised"), columns=2, height=3.2, sharey=True)
    for axes, task in panels.items():
        _differences(axes, result, task, QUANTISED, "dvora")
        axes.set_xlabel("difference to DVoRA r=256 on float32")
    return figure


def seeds(result: Result) -> Figure:
    """Question 6: test scores over shared matrices, and over orders of the batches."""
    figure, panels = _panels(result.tasks("seeds"), columns=2, height=2.2, sharey=True)
    for axes, task in panels.items():
        for place, (arm, (_, first)) in enumerate(SEEDS.items()):
            scores = [row["test"]["score"] for row in result.finals(task, arm).values()]
            scores += [row["test"]["score"] for seed, row in result.finals(task, first).items() if seed == 0]
            axes.plot(np.array(scores) * 100, [place] * len(scores), "o", color=COLOURS[first], alpha=0.7)
        axes.set_yticks(range(len(SEEDS)), [label for label, _ in SEEDS.values()])
        axes.set_title(LABELS[task], fontsize="medium")
        axes.grid(axis="x")
        axes.set_ylim(len(SEEDS) - 0.4, -0.6)
    return figure


def pareto(result: Result) -> Figure:
    """Question 7: gain over the frozen base against trained parameters, bytes and time, one row of panels a model."""
    tasks = [task for task in MODELS.values() if task in result.tasks("pareto")]
    figure, grid = plt.subplots(
        len(tasks), 3, figsize=(WIDTH, 0.8 + 2.2 * len(tasks)), layout="constrained", squeeze=False, sharey="row"
    )
    for line, task in zip(grid, tasks, strict=True):
        for axes, (what, label) in zip(line, _COSTS.items(), strict=True):
            for arm in COLOURS:
                gain, cost = result.gain(task, arm, "frozen"), _cost(result, task, arm, what)
                if gain and cost:
                    sides = [[gain.mean - gain.low], [gain.high - gain.mean]]
                    axes.errorbar([cost], [gain.mean], yerr=sides, fmt="o", color=COLOURS[arm], label=ARMS[arm])
            # Times lie within one decade, which a logarithmic axis has no numbers for.
            axes.set(xlabel=label, **({"xlim": (0, None)} if what == "seconds_per_step" else {"xscale": "log"}))
            axes.grid(visible=True)
        line[0].set_ylabel(f"{LABELS[task]}\ngain over the frozen base", fontsize="small")
    _legend_above(figure, grid[0][0])
    return figure


_COSTS = {
    "trained_values": "parameters, no head",
    "saved_bytes": "bytes of the file",
    "seconds_per_step": "seconds a step",
}


def _cost(result: Result, task: str, arm: str, what: str) -> float | None:
    if what != "seconds_per_step":
        return result.size(task, arm, what)
    return result.step(task, arm)


def _panels(tasks: Sequence[str], columns: int, height: float, sharey: bool = False) -> tuple[Figure, dict[Axes, str]]:
    """A figure as wide as a page with one panel a task, of this height in inches."""
    columns = max(1, min(columns, len(tasks)))
    lines = -(-len(tasks) // columns)
    size = (WIDTH, 0.4 + height * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False, sharey=sharey)
    for axes in list(grid.flat)[len(tasks) :]:
        axes.axis("off")
    return figure, dict(zip(grid.flat, tasks, strict=False))


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small")


def _differences(axes: Axes, result: Result, task: str, arms: Mapping[str, str], over: str) -> None:
    for place, arm in enumerate(arms):
        if gain := result.gain(task, arm, over):
            _dot(axes, place, gain, COLOURS.get(arm, COLOURS["dvora"] if gain.excludes_zero else FAINT))
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(arms)), list(arms.values()))
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y")
    axes.set_title(LABELS[task].replace(", ", "\n"), fontsize="medium")


def _dot(axes: Axes, place: float, gain: Interval, colour: str) -> None:
    sides = [[gain.mean - gain.low], [gain.high - gain.mean]]
    axes.errorbar([gain.mean], [place], xerr=sides, fmt="o", color=colour, capsize=2, markersize=5)


def _line(axes: Axes, at: Sequence[float], gains: Sequence[Interval], label: str, colour: str) -> None:
    sides = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
    axes.errorbar(at, [gain.mean for gain in gains], yerr=sides, marker="o", capsize=2, label=label, color=colour)


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
    for name, draw in PICTURES.items():
        if result.tasks(name):
            save(name, partial(draw, result))


if __name__ == "__main__":
    main()
