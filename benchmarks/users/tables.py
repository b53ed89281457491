"""The table and picture of many small users: what an adapter each gains, beside what it takes to store them all."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.pictures import FAINT, WIDTH
from benchmarks.quality.equal_bytes import ARMS, Shown
from benchmarks.quality.equal_bytes_plots import color_of
from benchmarks.quality.statistics import Interval, over_seeds

LABELS: Mapping[str, Shown] = {
    arm: ARMS[arm] for arm in ("structured_r64", "magnitude", "vera_r256", "lora_r1", "lora_r8")
}
"""How each arm is shown, in the order of the table."""
SOURCES: Mapping[str, str] = {"speakers": "Shakespeare's characters", "languages": "programming languages"}
YARDSTICK = "lora_r1"
Row = dict[str, Any]


def users(content: Mapping[str, Any]) -> str:
    """One row per source, number of examples and arm."""
    rows: list[Row] = content["rows"]
    hours, environment = sum(row["seconds"] for row in rows) / 3600, content["environment"]
    lines = [
        "| users, rows of each | adapter | kB for each, float16, no seeded matrices | nats a token below the base | "
        "below LoRA r=1 | users worse off than with the base |",
        "|---|---|---|---|---|---|",
    ]
    for source, examples in settings(rows):
        for arm, each in LABELS.items():
            gains = differences(rows, source, examples, arm, "base")
            if gains is not None:
                against = None if arm == YARDSTICK else lower(rows, source, examples, arm, YARDSTICK)
                size = next(row["smallest_bytes"] for row in _finals(rows, source, examples, arm).values())
                cells = (
                    f"{SOURCES[source]}, {examples}",
                    each.label,
                    f"{size / 1e3:,.0f}",
                    _shown(over_seeds(gains)),
                    _shown(against),
                    f"{(gains < 0).sum()}",
                )
                lines.append(f"| {' | '.join(cells)} |")
    counts = {len(row["losses"]) for row in rows if row["part"] == "test"}
    seeds = sorted({row["seed"] for row in rows if row["part"] == "test" and row["arm"] != "base"})
    lines += [
        "",
        f"{max(counts, default=0)} users of each kind, rows of 48 tokens, up to {len(seeds)} seeds; 95 % intervals are "
        f"over users. {hours:.1f} hours of one core (`benchmarks/results/users.json`; torch {environment['torch']}, "
        f"PEFT {environment['peft']}).",
    ]
    return "\n".join(lines) + "\n"


def settings(rows: list[Row]) -> list[tuple[str, int]]:
    """Sources and numbers of rows with which every arm was evaluated."""
    known = [(source, examples) for source in SOURCES for examples in sorted({row["examples"] for row in rows} - {0})]
    return [pair for pair in known if all(_finals(rows, *pair, arm) for arm in LABELS)]


def lower(rows: list[Row], source: str, examples: int, arm: str, over: str) -> Interval | None:
    """How much lower a user's loss is than with another arm, or the base: the mean over users, its 95 % interval."""
    each = differences(rows, source, examples, arm, over)
    return None if each is None else over_seeds(each)


def differences(rows: list[Row], source: str, examples: int, arm: str, over: str) -> np.ndarray | None:
    """How much lower each user's loss is than with another arm, or with the base, as a mean over the seeds of both."""
    ours = _finals(rows, source, examples, arm)
    theirs = _finals(rows, source, 0 if over == "base" else examples, over)
    if over == "base":
        theirs = dict.fromkeys(ours, theirs[0]) if theirs else {}
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    of_seeds = [np.array(theirs[seed]["losses"]) - np.array(ours[seed]["losses"]) for seed in seeds]
    return np.asarray(np.mean(of_seeds, axis=0))


def picture(content: Mapping[str, Any]) -> Figure:
    """Nats below LoRA r=1 against kilobytes of one user's adapter, one panel a source and number of rows."""
    rows: list[Row] = content["rows"]
    panels = settings(rows)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(WIDTH, 2.8), layout="constrained", squeeze=False, sharey=True, sharex=True
    )
    for axes, (source, examples) in zip(grid[0], panels, strict=True):
        for arm, each in LABELS.items():
            gain = lower(rows, source, examples, arm, YARDSTICK)
            assert gain is not None
            size = mean(row["smallest_bytes"] for row in _finals(rows, source, examples, arm).values())
            sides = [[gain.mean - gain.low], [gain.high - gain.mean]]
            axes.errorbar(
                [size / 1e3], [gain.mean], yerr=sides, fmt="o", capsize=2, color=color_of(each), label=each.label
            )
        axes.axhline(0, color=FAINT, linewidth=1)
        axes.set(xscale="log", xlabel="kB a user")
        axes.set_xticks([50, 100, 200, 500], ["50", "100", "200", "500"])
        axes.minorticks_off()
        axes.set_title(f"{SOURCES[source]},\n{examples} rows each", fontsize="small")
        axes.grid(visible=True)
    grid[0][0].set_ylabel("nats a token below LoRA r=1")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="small")
    return figure


def _finals(rows: list[Row], source: str, examples: int, arm: str) -> dict[int, Row]:
    wanted = (source, arm, examples, "test")
    return {r["seed"]: r for r in rows if (r["source"], r["arm"], r["examples"], r["part"]) == wanted}


def _shown(gain: Interval | None) -> str:
    return "" if gain is None else f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
