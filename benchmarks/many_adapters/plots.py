"""Pictures of many adapters: batches with more and more of them, requests for more and more, bytes of each.

Run from the repository's root: python -m benchmarks.many_adapters.plots [RESULT]
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.many_adapters.numbers import MANY, ROWS
from benchmarks.many_adapters.results import RESULT
from benchmarks.many_adapters.targets import DECODED, READ, TOKEN
from benchmarks.pictures import FAINT, METHODS, WIDTH, ink, save
from benchmarks.speed.metrics import Rows, time_ratio
from benchmarks.speed.plots import label_axis
from benchmarks.speed.timing import spread

COLOURS = {
    "dvora structured r=64": METHODS["DVoRA, r=64"],
    "dvora structured r=256": METHODS["DVoRA, structured"],
    "dvora dense r=256": METHODS["DVoRA"],
    "LoRA r=8": METHODS["LoRA"],
    "LoRA r=1": METHODS["LoRA r=1"],
}
STYLES = {"bank": ("o", "-"), "gathered": ("s", "-"), "adapter_names": ("x", ":")}
PANELS = {"linear layers,\nhidden 1,024, a token": DECODED, "MiniLM,\n32 tokens": READ, "SmolLM2,\none token": TOKEN}
DISTINCT = (1, 16, ROWS)
SHADES = {"p50": "-", "p95": "--", "p99": ":"}
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
PLACES = {
    "float16": ("in a slot or on the host, float16", 1.0),
    "folder": ("in a folder, float32", 0.65),
    "pack": ("in a pack", 0.35),
}
"""Where an adapter can be, and how opaque its bar is."""


def batch(rows: Rows) -> Figure:
    """Time of a batch against the number of different adapters in it."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(WIDTH, 4.4), layout="constrained", sharey=True)
    for axes, (title, setting) in zip(panels, PANELS.items(), strict=True):
        for way, (marker, line) in STYLES.items():
            for adapter, colour in COLOURS.items():
                points = [(n, ratio) for n in DISTINCT if (ratio := _ratio(rows, way, adapter, n, setting)) is not None]
                if points:
                    label, look = f"{way}, {adapter}", {"marker": marker, "linestyle": line, "color": colour}
                    axes.plot([n for n, _ in points], [ratio for _, ratio in points], label=label, **look)
        axes.axhline(1, color=FAINT, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="adapters in a batch of 64")
        label_axis(axes.xaxis, DISTINCT)
        label_axis(axes.yaxis, (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32))
        axes.set_title(title, fontsize="medium")
    panels[0].set_ylabel("time of a batch, frozen base = 1 (logarithmic)")
    _legend(figure, panels)
    return figure


def stream(rows: Rows) -> Figure:
    """Latencies against the number of adapters that are asked for."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 3.6), layout="constrained", sharey=True)
    for axes, loop in zip(both, ("closed", "open"), strict=True):
        found = [row for row in rows if row["part"] == "stream" and row["loop"] == loop and not row["used"]]
        with_adapters = [row for row in found if row["asked"]]
        asked = [row["asked"] for row in with_adapters]
        for share, line in SHADES.items():
            values = [_milliseconds(row, share) for row in with_adapters]
            axes.plot(asked, values, marker="o", linestyle=line, color=COLOURS["dvora structured r=256"], label=share)
            for row in (row for row in found if not row["asked"]):
                axes.axhline(_milliseconds(row, share), color=FAINT, linestyle=line, linewidth=1)
        slots = {row["slots"] for row in with_adapters}
        for count in slots:
            axes.axvline(count, color=FAINT, linewidth=1)
            axes.annotate(
                f"{count} slots", (count, 1), (3, -10), ("data", "axes fraction"), "offset points", color=ink()
            )
        axes.set(xscale="log", xlabel="adapters that are asked for")
        label_axis(axes.xaxis, asked)
        axes.set_title(f"{loop} loop", fontsize="medium")
    # After all lines, since it fixes the top too.
    both[0].set_ylim(bottom=0)
    both[0].set_ylabel("latency of a request, ms (grey: the base)")
    both[0].legend()
    return figure


def sizes(rows: Rows) -> Figure:
    """Kilobytes of an adapter in each place."""
    models = [model for model in MODELS if any(row.get("workload") == model for row in rows)]
    figure, panels = plt.subplots(1, max(len(models), 1), figsize=(WIDTH, 2.8), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], models, strict=False):
        _bars(axes, [row for row in rows if row["part"] == "storage" and row["workload"] == model])
        axes.set_title(MODELS[model], fontsize="medium")
    for axes in panels[0][1:]:
        axes.set_yticklabels([])
    patches = [Patch(facecolor=FAINT, alpha=alpha, label=label) for label, alpha in PLACES.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    return figure


def _bars(axes: Axes, found: Rows) -> None:
    for offset, (place, (_, alpha)) in enumerate(PLACES.items()):
        with_place = [(number, row) for number, row in enumerate(found) if place in row]
        at = [number + 0.27 * (offset - 1) for number, _ in with_place]
        colours = [COLOURS[row["arm"]] for _, row in with_place]
        bars = axes.barh(at, [row[place] / 1e3 for _, row in with_place], 0.24, alpha=alpha, color=colours)
        axes.bar_label(bars, [f"{row[place] / 1e3:,.0f}" for _, row in with_place], padding=3, fontsize="small")
    axes.set_yticks(range(len(found)), [row["arm"] for row in found])
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("kB an adapter")


def _ratio(rows: Rows, way: str, adapter: str, distinct: int, setting: dict[str, object]) -> float | None:
    for known in (MANY, ROWS):
        found = time_ratio(rows, f"{way}, {adapter}, {distinct} of {known:,}", "base", **setting)
        if found is not None:
            return found.median
    return None


def _milliseconds(row: dict[str, Any], share: str) -> float:
    # Few requests of one round lie above its 99th percentile.
    seconds = row["together"][share] if share == "p99" else spread(row[share]).median
    return float(seconds * 1e3)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """What any panel shows, once."""
    shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if shown:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize="small")


PICTURES = {"batch": batch, "stream": stream, "sizes": sizes}


def main() -> None:
    """Draw every picture anew."""
    result: dict[str, Any] = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else RESULT).read_text(encoding="utf-8"))
    for name, draw in PICTURES.items():
        save(f"many_{name}", partial(draw, result["rows"]))


if __name__ == "__main__":
    main()
