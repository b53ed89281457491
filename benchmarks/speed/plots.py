"""Pictures of the result file: ranks and tokens, decoding, memory.

Run from the repository's root: python -m benchmarks.speed.plots [RESULT]
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.pictures import FAINT, METHODS, WIDTH, ink, save
from benchmarks.speed.metrics import Rows, row_of, time_ratio
from benchmarks.speed.timing import Spread

RESULT = Path(__file__).parent.parent / "results" / "speed.json"
RANKS = (1, 16, 64, 256, 1024)
"""Of LoRA; those of the others start with the second."""
TOKENS = (128, 512, 2048, 4096)
COLOURS = {
    "base": METHODS["frozen base"],
    "full fine-tuning": METHODS["full fine-tuning"],
    "LoRA": METHODS["LoRA"],
    "LoRA r=1": METHODS["LoRA r=1"],
    "DoRA": METHODS["DoRA"],
    "VeRA": METHODS["VeRA"],
    "RandLoRA": METHODS["RandLoRA"],
    "dvora dense": METHODS["DVoRA"],
    "dvora structured r=64": METHODS["DVoRA, r=64"],
    "dvora structured": METHODS["DVoRA, structured"],
    "dvora merged": METHODS["DVoRA, merged"],
}
MARKERS = {
    **{"LoRA": "s", "LoRA r=1": "s", "DoRA": "v", "VeRA": "D"},
    **{"dvora dense": "o", "dvora structured": "P", "dvora structured r=64": "X"},
}
TRAINING = {"part": "training", "workload": "linears-1024", "dtype": "float32"}


def ranks(rows: Rows) -> Figure:
    """Time of a training step against the rank, at 512 tokens."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for method in ("LoRA", "VeRA", "dvora dense", "dvora structured"):
        at = RANKS if method == "LoRA" else RANKS[1:]
        _sweep(axes, rows, method, method, at, [{"arm": f"{method} r={r}", "tokens": 512} for r in at])
    _finish(axes, "rank", RANKS, "512 tokens")
    return figure


def tokens(rows: Rows) -> Figure:
    """Time of a training step against the number of tokens."""
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    dvora = ("dvora structured r=64", "dvora structured r=256", "dvora dense r=256")
    for arm in ("LoRA r=1", "DoRA r=16", "VeRA r=256", *dvora):
        _sweep(axes, rows, _look(arm), arm, TOKENS, [{"arm": arm, "tokens": count} for count in TOKENS])
    _finish(axes, "tokens in a step", TOKENS, "by method and rank")
    return figure


def decoding(rows: Rows) -> Figure:
    """Time of one decoded token, for one row and for sixteen."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 4.2), layout="constrained", sharey=True)
    setting = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
    arms = _arms(rows, **setting)
    for axes, batch in zip(both, (1, 16), strict=True):
        for place, arm in enumerate(arms):
            measured = time_ratio(rows, arm, "base", batch=batch, **setting)
            if measured is not None:
                _dot(axes, place, measured, _colour(arm))
        axes.axvline(1, color=FAINT, linewidth=1)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_xscale("log")
        label_axis(axes.xaxis, (1, 2, 4, 8, 16, 32))
        # Room for the labels beside the dots.
        axes.margins(x=0.2)
        axes.grid(axis="y")
        axes.set_title(f"batch {batch}", fontsize="medium")
        axes.set_xlabel("time of a token, frozen base = 1")
    both[0].invert_yaxis()
    figure.suptitle("Llama block, hidden size 1,024, float32", fontsize="medium")
    return figure


def memory(rows: Rows) -> Figure:
    """What a training step keeps for the backward pass, and what a method holds all the time."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 4.6), layout="constrained", sharey=True)
    setting = {"part": "memory", "workload": "linears-1024", "dtype": "float32"}
    found = {arm: row for arm in _arms(rows, **setting) if (row := row_of(rows, arm=arm, **setting))}
    arms, kept = list(found), [max(r["held_bytes"], r["saved_bytes"]) / 1e6 for r in found.values()]
    bars = both[0].barh(arms, kept, color=[_colour(arm) for arm in arms])
    both[0].bar_label(bars, fmt="%.0f", padding=3)
    tokens, weights = ({row[key] for row in found.values()} for key in ("tokens", "weight_bytes"))
    both[0].set(xlabel=f"kept for the backward pass\nof {max(tokens, default=0):,} tokens, MB")
    left = [0.0] * len(arms)
    for name, label, shade in (
        ("trained_bytes", "trained parameters", ink()),
        ("constant_bytes", "constants of single layers", FAINT),
        ("shared_bytes", "shared constants", "#5fb3b3"),
    ):
        sizes = [row[name] / 1e6 for row in found.values()]
        bars = both[1].barh(arms, sizes, left=left, color=shade, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    both[1].bar_label(bars, [f"{total:.1f}" for total in left], padding=3)
    both[1].set(xlabel=f"held all the time, MB\n(the base's weights: {max(weights, default=0) / 1e6:.0f})")
    figure.legend(loc="outside upper right", ncols=3)
    for axes, values in zip(both, (kept, left), strict=True):
        # Room for the labels.
        axes.set_xlim(0, 1.16 * max(values, default=1.0))
    both[0].invert_yaxis()
    return figure


def _dot(axes: Axes, place: int, measured: Spread, colour: str) -> None:
    low, median, high = measured
    axes.errorbar([median], [place], xerr=[[median - low], [high - median]], fmt="o", color=colour, capsize=3)
    axes.annotate(f"{median:.2f}", (high, place), (8, 0), textcoords="offset points", va="center", fontsize="small")


def _sweep(
    axes: Axes, rows: Rows, method: str, label: str, at: Sequence[int], wanted: Sequence[dict[str, object]]
) -> None:
    """Measured medians with quartiles."""
    measured = [time_ratio(rows, str(w["arm"]), "base", tokens=w["tokens"], **TRAINING) for w in wanted]
    points = [(x, ratio) for x, ratio in zip(at, measured, strict=True) if ratio is not None]
    if points:
        bars = [[ratio.median - ratio.low for _, ratio in points], [ratio.high - ratio.median for _, ratio in points]]
        axes.errorbar(
            [x for x, _ in points],
            [ratio.median for _, ratio in points],
            yerr=bars,
            label=label,
            color=COLOURS[method],
            marker=MARKERS[method],
            capsize=3,
        )


def _finish(axes: Axes, x_label: str, ticks: Sequence[int], what: str) -> None:
    axes.axhline(1, color=FAINT, linewidth=1)
    axes.set(xscale="log", yscale="log")
    label_axis(axes.xaxis, ticks)
    label_axis(axes.yaxis, (0.8, 0.9, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16))
    axes.set(xlabel=x_label, ylabel="training step, frozen base = 1 (logarithmic)")
    axes.set_title(f"Seven linear layers, hidden size 1,024, float32, {what}", fontsize="medium")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def label_axis(axis: Axis, ticks: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis; where they lie does not change what is shown."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _arms(rows: Rows, **setting: object) -> list[str]:
    matching = [row for row in rows if all(row.get(key) == value for key, value in setting.items())]
    return sorted({row["arm"] for row in matching}, key=lambda arm: (list(COLOURS).index(_look(arm)), len(arm)))


def _look(arm: str) -> str:
    """Whose colour and marker an arm has: its own, or those of its method."""
    return arm if arm in COLOURS else arm.split(" r=")[0]


def _colour(arm: str) -> str:
    return COLOURS[_look(arm)]


PICTURES = {"ranks": ranks, "tokens": tokens, "decoding": decoding, "memory": memory}


def main() -> None:
    """Draw every picture anew."""
    result: dict[str, Any] = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULT).read_text(encoding="utf-8"))
    for name, draw in PICTURES.items():
        save(f"speed_{name}", partial(draw, result["rows"]))


if __name__ == "__main__":
    main()
