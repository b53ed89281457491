"""The pictures of the documentation that are drawn from result files: python -m benchmarks.plots"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.many_adapters.targets import DECODED
from benchmarks.pictures import FAINT, METHODS, WIDTH, save
from benchmarks.quality.depth import picture as depth
from benchmarks.quality.page import MAIN, YARDSTICK, over_time, rivals
from benchmarks.quality.summary import result_of
from benchmarks.results import load
from benchmarks.speakers import picture as speakers
from benchmarks.speed.metrics import time_ratio

ARMS = {
    "lora_r1": ("LoRA r=1", "LoRA r=1"),
    "hyperadapt": ("HyperAdapt", "HyperAdapt"),
    "road": ("RoAd", "RoAd"),
    "structured_r64": ("DVoRA r=64", "DVoRA, r=64"),
    "structured_r256": ("DVoRA r=256", "DVoRA"),
    "structured_r1024": ("DVoRA r=1024", "DVoRA"),
    "road_4": ("RoAd 4", "RoAd"),
    "shira": ("SHiRA r=1", "SHiRA"),
    "shira_r2": ("SHiRA r=2", "SHiRA"),
    "lora_r2": ("LoRA r=2", "LoRA"),
    "lora_r4": ("LoRA r=4", "LoRA"),
    "lora_r8": ("LoRA r=8", "LoRA"),
}
"""Labels and colours of the grid's arms."""
BY_BYTES = {
    "lora_r1": ((0, 12), "center"),
    "hyperadapt": ((-9, -16), "right"),
    "road": ((-9, 2), "right"),
    "structured_r64": ((4, -34), "left"),
    "structured_r256": ((0, 32), "center"),
    "structured_r1024": ((9, 0), "left"),
    "road_4": ((9, -8), "left"),
    "shira": ((6, -34), "left"),
    "shira_r2": ((-9, 2), "right"),
    "lora_r2": ((9, -8), "left"),
    "lora_r4": ((9, -8), "left"),
    "lora_r8": ((9, 0), "left"),
}
"""Where the labels stand beside the points of a picture, and which way they go; so do the next two."""
BY_TIME = {
    "lora_r1": (9, -30),
    "hyperadapt": (-68, 14),
    "road": (9, 2),
    "structured_r64": (9, -16),
    "structured_r256": (9, -2),
    "lora_r8": (9, -4),
}
BESIDE_HIGH = {
    "lora_r1": ((-9, -12), "right"),
    "road": ((-9, 4), "right"),
    "structured_r256": ((9, 2), "left"),
    "structured_r1024": ((-9, -22), "right"),
    "road_4": ((9, 2), "left"),
    "shira": ((-9, -34), "right"),
    "shira_r2": ((9, -30), "left"),
    "lora_r2": ((9, -16), "left"),
    "lora_r4": ((9, -12), "left"),
    "lora_r8": ((9, -12), "left"),
}
STEPS = {
    "LoRA r=1": ("LoRA r=1", "LoRA r=1", 6),
    "dvora structured r=64": ("DVoRA r=64", "DVoRA, r=64", -6),
    "dvora structured r=256": ("DVoRA r=256", "DVoRA", 4),
    "VeRA r=256": ("VeRA r=256", "VeRA", -3),
    "DoRA r=16": ("DoRA r=16", "DoRA", 3),
}
"""Labels, colours, and by how much the labels are moved upwards."""
TOKENS = (128, 512, 2048, 4096)
WAYS = {
    "adapter_names, LoRA r=8": ("PEFT's adapter_names, LoRA r=8", "LoRA", 0),
    "adapter_names, dvora structured r=64": ("PEFT's adapter_names, DVoRA r=64", "DVoRA, r=64", 0),
    "bank, dvora structured r=256": ("bank, DVoRA r=256", "DVoRA", 0),
    "gathered, LoRA r=1": ("batched products, LoRA r=1", "LoRA r=1", 5),
}
DISTINCT = (1, 16, 64)


def equal_bytes() -> Figure:
    """Points above LoRA r=1 against the size of the adapter's file: means over tasks with 95 % intervals."""
    result = result_of(load("equal_bytes"))
    tasks = result.tasks(*MAIN)
    figure, axes = plt.subplots(figsize=(WIDTH, 4), layout="constrained")
    axes.axhline(0, color=FAINT, linewidth=1)
    for arm, (offset, side) in BY_BYTES.items():
        label, method = ARMS[arm]
        size = (result.size(tasks[0], arm, "saved_bytes") or 0) / 1e3
        gain = None if arm == YARDSTICK else result.gain(tasks, arm, YARDSTICK)
        mean, ends = (gain.mean, [[gain.mean - gain.low], [gain.high - gain.mean]]) if gain else (0.0, None)
        axes.errorbar([size], [mean], yerr=ends, fmt="o", markersize=9, capsize=4, color=METHODS[method])
        text = f"{label}\n{size:,.0f} kB" + ("" if gain is None else f", {mean:+.1f}")
        look: dict[str, Any] = {"color": METHODS[method], "weight": "bold", "ha": side}
        axes.annotate(text, (size, mean), offset, textcoords="offset points", **look)
    axes.set(xscale="log", xlim=(90, 2600), ylim=(-0.35, 3.1), xlabel="the adapter's file, kB (logarithmic)")
    label_axis(axes.xaxis, (100, 200, 500, 1000, 2000))
    axes.set_ylabel("test points above LoRA r=1")
    title = f"MiniLM, mean over {len(tasks)} tasks, 500 steps of every method, 95 % intervals"
    axes.set_title(title, fontsize="medium", loc="left")
    return figure


def equal_time() -> Figure:
    """Points above LoRA r=1's 500 steps against the time of training: a line a method, with 95 % intervals."""
    lines = over_time(result_of(load("equal_bytes")), load("pace")["rows"])
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    axes.axhline(0, color=FAINT, linewidth=1)
    for arm, offset in BY_TIME.items():
        label, method = ARMS[arm]
        times, means = zip(*((each.time, each.above.mean) for each in lines[arm]), strict=True)
        ends = [
            [each.above.mean - each.above.low for each in lines[arm]],
            [each.above.high - each.above.mean for each in lines[arm]],
        ]
        axes.errorbar(times, means, yerr=ends, fmt="o-", markersize=6, capsize=3, color=METHODS[method])
        look: dict[str, Any] = {"color": METHODS[method], "weight": "bold"}
        axes.annotate(label, (times[-1], means[-1]), offset, textcoords="offset points", **look)
    axes.set(xscale="log", xlim=(0.8, 2.2), xlabel="time of training, LoRA r=1's 500 steps = 1 (logarithmic)")
    label_axis(axes.xaxis, (0.8, 1, 1.25, 1.5, 2))
    axes.set_ylabel("test points above\nLoRA r=1's 500 steps")
    axes.set_title("MiniLM, mean over five tasks, 95 % intervals", fontsize="medium", loc="left")
    return figure


def high_rank() -> Figure:
    """Points above LoRA r=1's 500 steps against bytes: after 500 steps, and after as long as r=1024's 500 take."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    axes.axhline(0, color=FAINT, linewidth=1)
    for each in rivals(result_of(load("equal_bytes")), load("pace")["rows"]):
        (label, method), (offset, side) = ARMS[each.arm], BESIDE_HIGH[each.arm]
        size, color = each.size / 1e3, METHODS[method]
        short = each.gain.mean if each.gain else 0.0
        axes.plot([size], [short], "o", markersize=8, color=color, fillstyle="none")
        if each.gain_in_time:
            gain = each.gain_in_time
            ends = [[gain.mean - gain.low], [gain.high - gain.mean]]
            axes.plot([size, size], [short, gain.mean], color=color, linewidth=1, linestyle=":")
            axes.errorbar([size], [gain.mean], yerr=ends, fmt="o", markersize=8, capsize=4, color=color)
        look: dict[str, Any] = {"color": color, "weight": "bold", "ha": side}
        top = each.gain_in_time.mean if each.gain_in_time else short
        narrow = label.replace(" r=", "\nr=")
        axes.annotate(f"{narrow}\n{size:,.0f} kB", (size, top), offset, textcoords="offset points", **look)
    axes.set(xscale="log", xlim=(60, 950), xlabel="the adapter in float16, kB (logarithmic)")
    label_axis(axes.xaxis, (100, 200, 300, 500, 700))
    axes.set_ylabel("test points above\nLoRA r=1's 500 steps")
    title = "Rings: 500 steps; discs: as long as 500 steps of DVoRA r=1024 take"
    axes.set_title(title, fontsize="medium", loc="left")
    return figure


def speed_tokens() -> Figure:
    """Time of a training step against the number of tokens."""
    rows = load("speed")["rows"]
    setting = {"part": "training", "workload": "linears-1024", "dtype": "float32"}
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for arm, look in STEPS.items():
        ratios = [time_ratio(rows, arm, "base", tokens=tokens, **setting) for tokens in TOKENS]
        _line(axes, TOKENS, [ratio and ratio.median for ratio in ratios], *look)
    _finish(axes, "tokens in a step", TOKENS, (1, 1.25, 1.5, 2, 2.5), "a training step, frozen base = 1")
    axes.set(xlim=(110, 9500))
    axes.set_title("Seven linear layers, hidden size 1,024, float32, CPU", fontsize="medium", loc="left")
    return figure


def many_batch() -> Figure:
    """Time of a batch against the number of different adapters in it."""
    rows = load("many_adapters")["rows"]
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for way, look in WAYS.items():
        medians = []
        for distinct in DISTINCT:
            found = [time_ratio(rows, f"{way}, {distinct} of {known}", "base", **DECODED) for known in ("1,024", "64")]
            medians.append(next((ratio.median for ratio in found if ratio is not None), None))
        _line(axes, DISTINCT, medians, *look)
    _finish(
        axes, "adapters in a batch of 64 rows", DISTINCT, (1, 1.25, 1.5, 2, 2.5), "time of a batch, frozen base = 1"
    )
    axes.set(xlim=(0.9, 2200))
    axes.set_title("Fourteen linear layers, hidden size 1,024, one token a row, CPU", fontsize="medium", loc="left")
    return figure


def label_axis(axis: Axis, ticks: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis; where they lie does not change what is shown."""
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _line(
    axes: Axes, at: Sequence[float], values: Sequence[float | None], label: str, method: str, upwards: int
) -> None:
    """A line through what was measured, with its label at the right end."""
    points = [(x, value) for x, value in zip(at, values, strict=True) if value is not None]
    axes.plot(*zip(*points, strict=True), marker="o", color=METHODS[method])
    look: dict[str, Any] = {"color": METHODS[method], "weight": "bold", "va": "center"}
    axes.annotate(label, points[-1], (8, upwards), textcoords="offset points", **look)


def _finish(axes: Axes, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float], y_label: str) -> None:
    axes.axhline(1, color=FAINT, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    label_axis(axes.xaxis, x_ticks)
    label_axis(axes.yaxis, y_ticks)


PICTURES: dict[str, Callable[[], Figure]] = {
    "equal_bytes": equal_bytes,
    "high_rank": high_rank,
    "equal_time": equal_time,
    "speed_tokens": speed_tokens,
    "many_batch": many_batch,
    "depth": depth,
    "speakers": lambda: speakers(load("speakers")),
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        save(name, draw)
