"""The table and picture of GRPO: what is solved after it beside what a synchronisation sends, and rewards by steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pictures import WIDTH
from benchmarks.quality.equal_bytes import ARMS, Shown
from benchmarks.quality.equal_bytes_plots import color_of
from benchmarks.quality.statistics import Difference, Interval, mean_difference, over_seeds, paired_difference
from benchmarks.quality.tables import difference
from benchmarks.reinforcement.arms import BASE
from benchmarks.reinforcement.plan import STEPS
from benchmarks.reinforcement.problems import PROBLEMS

Row = Mapping[str, Any]
ORDER = ("magnitude", "vera_r256", "lora_r1", "structured_r64", "dvora_r256", "dora_r8", "lora_r16", "full")
LABELS: Mapping[str, Shown] = {arm: ARMS[arm] for arm in ORDER}
"""How each arm is shown, in the order of the table."""
YARDSTICK, MARGIN = "lora_r1", 1.0
"""What DVoRA has to come within so many points of."""
SMOOTHED = 10
"""Steps of which a point of the picture is the mean."""


def finals(rows: Sequence[Row], problem: str, arm: str) -> dict[int, Row]:
    """Evaluated runs by seed; those that failed have no answers and are left out."""
    found = (row for row in rows if (row["problem"], row["arm"], row["part"]) == (problem, arm, "test"))
    return {row["seed"]: row for row in found if row["solved"]}


def shown(rows: Sequence[Row]) -> list[str]:
    """Problems with finished runs of LoRA r=1."""
    return [problem for problem in PROBLEMS if finals(rows, problem, YARDSTICK)]


def gain(rows: Sequence[Row], problem: str, arm: str) -> Difference | None:
    """How many points more an arm solves than LoRA r=1, on the seeds that both have."""
    ours, theirs = finals(rows, problem, arm), finals(rows, problem, YARDSTICK)
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    both = [np.array([each[seed]["solved"] for seed in seeds]) for each in (ours, theirs)]
    return paired_difference("accuracy", *both, np.zeros(both[0].shape[1]))


def solved(rows: Sequence[Row], problem: str, arm: str) -> Interval | None:
    """Percent of the test questions, a mean over seeds."""
    found = finals(rows, problem, arm).values()
    return over_seeds(np.array([100 * np.mean(row["solved"]) for row in found])) if found else None


def said(row: Row) -> str:
    """What came out of a run, in a line."""
    return row.get("error") or f"{np.mean(row['solved']):.1%} solved"


def reinforcement(content: Mapping[str, Any]) -> str:
    """One row an arm, and whether DVoRA is within a point of LoRA r=1."""
    rows, environment = content["rows"], content["environment"]
    problems = shown(rows)
    if not problems:
        return "No problem has finished runs of LoRA r=1 yet.\n"
    heads = [cell for name in problems for cell in (f"{name}: solved, %", "above LoRA r=1")]
    head = ["", "kB a synchronisation, float16, no seeded matrices", *heads]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [_line(rows, problems, BASE, "base")]
    having = {arm: [problem for problem in problems if finals(rows, problem, arm)] for arm in LABELS}
    lines += [_line(rows, problems, arm, LABELS[arm].label) for arm in LABELS if having[arm]]
    lines += ["", *(_verdict(rows, having[arm], arm) for arm in ("structured_r64", "dvora_r256") if having[arm])]
    failed = sum("error" in row for row in rows)
    hours, seeds = sum(row["seconds"] for row in rows) / 3600, len(finals(rows, problems[0], YARDSTICK))
    count = len(finals(rows, problems[0], YARDSTICK)[0]["solved"])
    lines += [
        "",
        f"{STEPS} steps, {seeds} seeds, greedy answers to {count} questions that training never saw; {len(rows)} runs, "
        f"{failed} of them failed, {hours:.1f} hours of one core (`benchmarks/results/reinforcement.json`; torch "
        f"{environment['torch']}, PEFT {environment['peft']}).",
    ]
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row]) -> Figure:
    """For each problem: the reward by steps, and what is solved in the end against bytes of a synchronisation."""
    problems = shown(rows)
    size = (WIDTH, 2.6 * len(problems) + 0.4)
    figure, grid = plt.subplots(len(problems), 2, sharex="col", figsize=size, layout="constrained", squeeze=False)
    for (left, right), problem in zip(grid, problems, strict=True):
        for arm in LABELS:
            if found := list(finals(rows, problem, arm).values()):
                _draw(left, right, rows, problem, arm, found)
        left.set(xlabel="steps", ylabel="right answers, %", title=f"{problem}: sampled in training")
        right.set(xscale="log", xlabel="kB a synchronisation", title=f"{problem}: greedy, test questions")
        right.set_xticks([100, 1000, 10_000, 100_000], ["100", "1,000", "10,000", "100,000"])
        right.minorticks_off()
        for axes in (left, right):
            axes.grid(visible=True)
            # An interval over few seeds may be wider than there is room.
            axes.set_ylim(top=min(axes.get_ylim()[1], 101))
            axes.title.set_fontsize("medium")
    handles = {text: each for axes in grid.flat for each, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize="small")
    return figure


def _draw(left: Axes, right: Axes, rows: Sequence[Row], problem: str, arm: str, found: list[Row]) -> None:
    color = color_of(LABELS[arm])
    rewards = 100 * np.mean([row["rewards"] for row in found], axis=0)
    smooth = np.convolve(rewards, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
    left.plot(np.arange(len(smooth)) + SMOOTHED, smooth, color=color, linewidth=1.2)
    score = solved(rows, problem, arm)
    assert score is not None
    ends = [[score.mean - score.low], [score.high - score.mean]]
    size = found[0]["smallest_bytes"] / 1e3
    right.errorbar(
        [size], [score.mean], yerr=ends, fmt="o", markersize=4, capsize=2, color=color, label=LABELS[arm].label
    )


def _line(rows: Sequence[Row], problems: Sequence[str], arm: str, label: str) -> str:
    every = (row for problem in problems for row in finals(rows, problem, arm).values())
    size = next((row["smallest_bytes"] for row in every if "smallest_bytes" in row), None)
    cells = [label, "" if size is None else f"{size / 1e3:,.0f}"]
    for problem in problems:
        score = solved(rows, problem, arm)
        cells.append("" if score is None else f"{score.mean:.1f}")
        found = None if arm in (BASE, YARDSTICK) else gain(rows, problem, arm)
        cells.append("" if found is None else difference(mean_difference([found]), 1))
    return f"| {' | '.join(cells)} |"


def _verdict(rows: Sequence[Row], problems: Sequence[str], arm: str) -> str:
    every = [found for problem in problems if (found := gain(rows, problem, arm)) is not None]
    interval = mean_difference(every)
    if interval.low > -MARGIN:
        said = "it is within a point of LoRA r=1, or above it"
    elif interval.high < -MARGIN:
        said = "**it is not within a point of LoRA r=1**"
    else:
        said = "these runs do not decide whether it is within a point of LoRA r=1"
    return f"- {LABELS[arm].label} minus LoRA r=1, {' and '.join(problems)}: {difference(interval, 1)}; {said}."
