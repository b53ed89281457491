"""Pictures of the result file: ranks and tokens beside the cost model, decoding, memory.

Run from the repository's root: python -m benchmarks.speed.plots [RESULT]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed.cost_model import llama_block, relative_cost
from benchmarks.speed.figures import Rows, row_of, time_ratio

RESULT = Path(__file__).parent.parent / "results" / "speed.json"
FOLDER = Path(__file__).parent.parent / "plots"
RANKS = (16, 64, 256, 1024)
TOKENS = (128, 512, 2048, 4096)
BLOCK = llama_block(1024, 2816)
COLOURS = {
    "base": "0.5",
    "full fine-tuning": "0.25",
    "LoRA": "tab:green",
    "DoRA": "tab:red",
    "VeRA": "tab:orange",
    "RandLoRA": "tab:brown",
    "dvora dense": "tab:blue",
    "dvora structured": "tab:purple",
    "dvora merged": "tab:cyan",
}
MARKERS = {"LoRA": "s", "DoRA": "v", "VeRA": "D", "dvora dense": "o", "dvora structured": "P"}
TRAINING = {"part": "training", "workload": "linears-1024", "dtype": "float32"}


def ranks(rows: Rows) -> Figure:
    """Time of a training step against the rank, at 512 tokens."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method in ("LoRA", "VeRA", "dvora dense", "dvora structured"):
        _sweep(axes, rows, method, method, RANKS, [{"arm": f"{method} r={r}", "tokens": 512} for r in RANKS])
        _model_line(axes, method, RANKS, [relative_cost(method, BLOCK, rank, 512) for rank in RANKS])
    _finish(axes, "rank", RANKS, "512 tokens")
    return figure


def tokens(rows: Rows) -> Figure:
    """Time of a training step against the number of tokens, at rank 256 and DoRA's 16."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for method, rank in (("DoRA", 16), ("VeRA", 256), ("dvora dense", 256), ("dvora structured", 256)):
        arm = f"{method} r={rank}"
        _sweep(axes, rows, method, arm, TOKENS, [{"arm": arm, "tokens": count} for count in TOKENS])
        _model_line(axes, method, TOKENS, [relative_cost(method, BLOCK, rank, count) for count in TOKENS])
    _finish(axes, "tokens in a step", TOKENS, "rank 256, and 16 for DoRA")
    return figure


def decoding(rows: Rows) -> Figure:
    """Time of one decoded token, for one row and for sixteen."""
    figure, both = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    setting = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
    arms = _arms(rows, **setting)
    for axes, batch in zip(both, (1, 16), strict=True):
        figures = {arm: time_ratio(rows, arm, "base", batch=batch, **setting) for arm in arms}
        present = {arm: value for arm, value in figures.items() if value is not None}
        medians = [value.median for value in present.values()]
        low = [value.median - value.low for value in present.values()]
        high = [value.high - value.median for value in present.values()]
        bars = axes.barh(list(present), medians, xerr=(low, high), color=[_colour(arm) for arm in present])
        axes.bar_label(bars, fmt="%.2f", padding=6)
        axes.axvline(1, color="0.6", linewidth=1)
        axes.margins(x=0.18)
        axes.set(title=f"batch {batch}", xlabel="time of a token, frozen base = 1")
    both[0].invert_yaxis()
    return figure


def memory(rows: Rows) -> Figure:
    """What a training step keeps and what a method holds all the time."""
    figure, both = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    setting = {"part": "memory", "workload": "linears-1024", "dtype": "float32"}
    found = {arm: row for arm in _arms(rows, **setting) if (row := row_of(rows, arm=arm, **setting))}
    arms, kept = list(found), [max(r["held_bytes"], r["saved_bytes"]) / 1e6 for r in found.values()]
    bars = both[0].barh(arms, kept, color=[_colour(arm) for arm in arms])
    both[0].bar_label(bars, fmt="%.0f", padding=3)
    both[0].set(xlabel="kept for the backward pass, MB")
    left = [0.0] * len(arms)
    for name, label, shade in (
        ("trained_bytes", "trained", "0.2"),
        ("constant_bytes", "of one layer", "0.5"),
        ("shared_bytes", "shared", "0.8"),
    ):
        sizes = [row[name] / 1e6 for row in found.values()]
        both[1].barh(arms, sizes, left=left, color=shade, label=label)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    both[1].set(xlabel="beside the base's weights, MB")
    both[1].legend(loc="lower right", frameon=False)
    for axes in both:
        axes.margins(x=0.14)
    both[0].invert_yaxis()
    return figure


def _sweep(
    axes: Axes, rows: Rows, method: str, label: str, at: Sequence[int], wanted: Sequence[dict[str, object]]
) -> None:
    """Measured medians with quartiles."""
    measured = [time_ratio(rows, str(w["arm"]), "base", tokens=w["tokens"], **TRAINING) for w in wanted]
    points = [(x, figure) for x, figure in zip(at, measured, strict=True) if figure is not None]
    if points:
        bars = [[f.median - f.low for _, f in points], [f.high - f.median for _, f in points]]
        axes.errorbar(
            [x for x, _ in points],
            [f.median for _, f in points],
            yerr=bars,
            label=label,
            color=COLOURS[method],
            marker=MARKERS[method],
            capsize=3,
        )


def _model_line(axes: Axes, method: str, at: Sequence[int], costs: Sequence[float]) -> None:
    axes.plot(at, costs, color=COLOURS[method], linestyle=":", marker=MARKERS[method], fillstyle="none", alpha=0.7)


def _finish(axes: Axes, x_label: str, ticks: Sequence[int], what: str) -> None:
    axes.plot([], [], color="0.4", linestyle=":", label="operations (model)")
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_label, ylabel="training step, frozen base = 1")
    axes.set_title(f"Seven linear layers, hidden size 1,024, float32, {what}", fontsize="medium")
    axes.legend(frameon=False)


def _arms(rows: Rows, **setting: object) -> list[str]:
    matching = [row for row in rows if all(row.get(key) == value for key, value in setting.items())]
    return sorted({row["arm"] for row in matching}, key=lambda arm: (list(COLOURS).index(_method(arm)), len(arm)))


def _method(arm: str) -> str:
    return arm.split(" r=")[0]


def _colour(arm: str) -> str:
    return COLOURS[_method(arm)]


def main() -> None:
    """Draw every picture anew."""
    result: dict[str, Any] = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULT).read_text(encoding="utf-8"))
    FOLDER.mkdir(exist_ok=True)
    for name, draw in {"ranks": ranks, "tokens": tokens, "decoding": decoding, "memory": memory}.items():
        figure = draw(result["rows"])
        figure.savefig(FOLDER / f"{name}.png", dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()
