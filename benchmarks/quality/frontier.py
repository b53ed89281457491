"""Diagonals beside every method of at most as many bytes: the rule of LOG.md (2026-12-07).

The rows are those of `equal_bytes.json` and `diagonals.json`; `python -m benchmarks.quality.frontier` prints what the
rule says, from the rows that there are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.pictures import FAINT, METHODS, WIDTH
from benchmarks.quality.page import LABELS, YARDSTICK, gained
from benchmarks.quality.statistics import Interval
from benchmarks.quality.summary import LABELLED, NAMES, Result
from benchmarks.results import load
from benchmarks.tables import kilobytes, points, span, table, text

DIAGONALS: Mapping[str, int] = {f"diagonals_{count}": count for count in (1, 2, 3, 6, 12)}
"""Arms by their number of diagonals."""
DECISIVE, AT_LEAST = ("diagonals_1", "diagonals_3", "diagonals_6", "diagonals_12"), 3
"""Arms at whose size they have to be best, and at how many."""
WORTH = 0.3
"""Points of the mean validation score for which more diagonals are taken."""
LINES: Mapping[str, tuple[str, ...]] = {
    "LoRA": ("lora_r1", "lora_r2", "lora_r4", "lora_r8", "lora_r16"),
    "SHiRA": ("shira", "shira_r2", "shira_r4", "shira_r8"),
    "RoAd": ("road", "road_4"),
    "VeRA": ("vera_r256",),
    "DVoRA, r=64": ("structured_r64", "structured_r1024"),
    "DVoRA": tuple(DIAGONALS),
}
"""Methods of the picture, which have its colours, and their arms by size."""


class Beside(NamedTuple):
    """A rival of at most as many bytes, and how many points it is below."""

    arm: str
    size: int
    gain: Interval


def both() -> Result:
    """The rows of both files."""
    return Result((*load("equal_bytes")["rows"], *load("diagonals")["rows"]))


def half_bytes(result: Result, task: str, arm: str) -> int:
    """Bytes of what an arm trains in float16, without heads and headers of files."""
    values = result.size(task, arm, "trained_values")
    assert values is not None, arm
    return 2 * values


def rivals(result: Result, tasks: Sequence[str], arm: str) -> list[Beside]:
    """Every method with rows of all these tasks that has at most as many bytes, the strongest first."""
    limit = half_bytes(result, tasks[0], arm)
    beside = []
    for rival in LABELS:
        gain = result.gain(tasks, arm, rival)
        if gain and (size := half_bytes(result, tasks[0], rival)) <= limit:
            beside.append(Beside(rival, size, gain))
    return sorted(beside, key=lambda each: each.gain.mean)


def is_best(result: Result, tasks: Sequence[str], arm: str) -> bool:
    """Whether its mean is above all of theirs."""
    return all(each.gain.mean > 0 for each in rivals(result, tasks, arm))


def validated(result: Result, tasks: Sequence[str], arm: str) -> float:
    """Mean validation score of the final runs, in points."""
    scores = [[row["validation"]["score"] for row in result.finals(task, arm).values()] for task in tasks]
    return 100 * float(np.mean([np.mean(of_task) for of_task in scores]))


def default(result: Result, tasks: Sequence[str]) -> str:
    """From one diagonal on, the next larger number while it is worth its bytes."""
    best, *others = DIAGONALS
    for arm in others:
        if validated(result, tasks, arm) - validated(result, tasks, best) < WORTH:
            break
        best = arm
    return best


def finished(result: Result) -> list[str]:
    """Arms of diagonals with final runs on all tasks."""
    return [arm for arm in DIAGONALS if len(result.tasks(arm)) == len(LABELLED)]


def frontier(result: Result) -> str:
    """Diagonals by size with their two strongest rivals, as a table."""
    arms = finished(result)
    lines = []
    for arm in arms:
        nearest, *others = rivals(result, LABELLED, arm)
        lines.append(
            (
                *(f"n={DIAGONALS[arm]}", kilobytes(half_bytes(result, LABELLED[0], arm))),
                gained(result.gain(LABELLED, arm, YARDSTICK)),
                *(_said(each) for each in (nearest, others[0])),
                f"{validated(result, LABELLED, arm):.1f}",
                *(_score(result, task, arm) for task in LABELLED),
            )
        )
    seeds = span(len(result.finals(task, arm)) for task in LABELLED for arm in arms)
    head = ("", "kB, float16", "points above LoRA r=1", "above the best rival", "above the next", "validation")
    return text(
        table((*head, *(NAMES[task] for task in LABELLED)), lines),
        f"Test scores, mean over five tasks, {seeds} seeds, 95 % intervals; rivals have at most as many bytes "
        "(`diagonals.json`, `equal_bytes.json`).",
    )


def _said(rival: Beside) -> str:
    return f"{LABELS[rival.arm]} ({kilobytes(rival.size)} kB): {points(rival.gain.mean, rival.gain)}"


def _score(result: Result, task: str, arm: str) -> str:
    score = result.score(task, arm)
    assert score is not None
    return f"{score.mean:.1f}"


def picture() -> Figure:
    """Points above LoRA r=1 against bytes in float16: a line a method, with 95 % intervals."""
    result = both()
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    axes.axhline(0, color=FAINT, linewidth=1)
    for method, arms in LINES.items():
        known = [arm for arm in arms if len(result.tasks(arm)) == len(LABELLED)]
        gains = [_gain(result, arm) for arm in known]
        sizes, means = [half_bytes(result, LABELLED[0], arm) / 1e3 for arm in known], [gain.mean for gain in gains]
        ends = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
        axes.errorbar(sizes, means, yerr=ends, fmt="o-", markersize=6, capsize=3, color=METHODS[method])
        for arm, size, mean in zip(known, sizes, means, strict=True):
            label = f"n={DIAGONALS[arm]}" if arm in DIAGONALS else LABELS[arm].removesuffix(", structured")
            look: dict[str, Any] = {"color": METHODS[method], "fontsize": "small"}
            axes.annotate(label, (size, mean), (5, 5), textcoords="offset points", **look)
    axes.set(xscale="log", xlabel="what is trained, in float16, kB (logarithmic)")
    axes.xaxis.set_major_locator(FixedLocator((50, 100, 200, 400, 800, 1600)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("test points above LoRA r=1")
    axes.set_title("MiniLM, mean over five tasks, 500 steps, 95 % intervals", fontsize="medium", loc="left")
    return figure


def _gain(result: Result, arm: str) -> Interval:
    gain = Interval(0, 0, 0) if arm == YARDSTICK else result.gain(LABELLED, arm, YARDSTICK)
    assert gain is not None
    return gain


def main() -> None:
    """Print the table, every rival and the verdict."""
    result = both()
    arms: Sequence[str] = finished(result)
    print(frontier(result))
    for arm in arms:
        verdict = "the best" if is_best(result, LABELLED, arm) else "NOT the best"
        print(f"\n{arm}, {kilobytes(half_bytes(result, LABELLED[0], arm))} kB, is {verdict}:")
        for each in rivals(result, LABELLED, arm):
            print(f"  {points(each.gain.mean, each.gain)} above {LABELS[each.arm]} ({kilobytes(each.size)} kB)")
    best = [arm for arm in DECISIVE if arm in arms and is_best(result, LABELLED, arm)]
    print(f"\nThe best at {len(best)} sizes of {len(DECISIVE)}; {AT_LEAST} make it the default.")
    if arms == list(DIAGONALS):
        print(f"By validation scores the default has n={DIAGONALS[default(result, LABELLED)]}.")


if __name__ == "__main__":
    main()
