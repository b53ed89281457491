"""The picture of the second grid: score against bytes of the saved adapter.

Run from the repository's root: python -m benchmarks.quality.equal_bytes_plots [RESULT]
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pictures import FAINT, METHODS, WIDTH, save
from benchmarks.quality.equal_bytes import (
    ARMS,
    GENERATION,
    MAIN,
    TWO,
    YARDSTICK,
    Shown,
    arms_of,
    gain,
    smallest_bytes,
    tasks_of,
)
from benchmarks.quality.results import EQUAL_BYTES
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import Result, names_of, result_of

TICKS = (20, 50, 100, 200, 500, 1000, 2000, 5000)
DECADES = (10, 100, 1000, 10_000)
"""Kilobytes, on an axis of less than two decades, and on a longer one."""
WHOLE = "full"
"""The arm that is no adapter."""


def equal_bytes(result: Result) -> Figure:
    """Points above LoRA r=1 against kilobytes, 95 % intervals: main arms on all tasks, all arms on two, generation."""
    classified = [tasks for tasks in (tasks_of(result, MAIN), tasks_of(result, TWO)) if tasks]
    generated = tasks_of(result, GENERATION, generated=True)
    panels = [*classified, generated] if generated else classified
    figure, grid = plt.subplots(1, len(panels), figsize=(WIDTH, 4.4), layout="constrained", squeeze=False)
    for axes in grid[0][1 : len(classified)]:
        axes.sharex(grid[0][0])
        axes.sharey(grid[0][0])
    for axes, tasks in zip(grid[0], panels, strict=True):
        _panel(axes, result, tasks)
    for axes in grid[0]:
        low, high = axes.get_xlim()
        ticks = [tick for tick in (DECADES if high > 100 * low else TICKS) if low <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    grid[0][0].set_ylabel("points above LoRA r=1 on test")
    known = {text: handle for axes in grid[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), loc="outside upper center", ncols=5, fontsize="small")
    return figure


def color_of(shown: Shown) -> str:
    """Of an arm that stands for itself: its own, or its method's."""
    return METHODS.get(shown.label, METHODS[shown.method])


def _panel(axes: Axes, result: Result, tasks: list[str]) -> None:
    of_method: dict[str, list[str]] = {}
    for arm in arms_of(result, tasks):
        if arm == WHOLE:
            _level(axes, gain(result, tasks, arm), ARMS[arm].method)
        else:
            of_method.setdefault(ARMS[arm].method, []).append(arm)
    for method, arms in of_method.items():
        arms = sorted(arms, key=lambda arm: smallest_bytes(result, tasks[0], arm))
        found = [gain(result, tasks, arm) for arm in arms]
        at = [smallest_bytes(result, tasks[0], arm) / 1e3 for arm in arms]
        means = [each.mean if each else 0.0 for each in found]
        sides = [
            [each.mean - each.low if each else 0 for each in found],
            [each.high - each.mean if each else 0 for each in found],
        ]
        own = METHODS.get(method, FAINT)
        marker = "s" if arms == [YARDSTICK] else "o"
        axes.errorbar(
            at, means, yerr=sides, fmt=f"{marker}-", markersize=4, linewidth=1, capsize=2, color=own, label=method
        )
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.grid(visible=True)
    axes.set(xscale="log", xlabel="kB, float16, no seeded matrices")
    axes.set_title(f"mean over {len(tasks)} tasks" if len(tasks) > 1 else names_of(tasks), fontsize="medium")


def _level(axes: Axes, found: Interval | None, method: str) -> None:
    """A line with its interval: at its bytes, hundreds of times an adapter's, it would press the others together."""
    if found is not None:
        axes.axhline(found.mean, color=METHODS[method], linewidth=1, linestyle="--", label=method)
        axes.axhspan(found.low, found.high, color=METHODS[method], alpha=0.15, linewidth=0)


def main() -> None:
    """Draw the picture of a result file."""
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else EQUAL_BYTES
    result = result_of(json.loads(file.read_text(encoding="utf-8")))
    save("equal_bytes", lambda: equal_bytes(result))


if __name__ == "__main__":
    main()
