"""The tables of the page "Overhead", from the result file of `benchmarks.speed.overhead`."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.speed.arms import BASE
from benchmarks.speed.estimate import Assumptions, step
from benchmarks.speed.metrics import Rows, host_ratio, host_seconds, kernels_a_layer, row_of
from benchmarks.speed.tables import missing
from benchmarks.speed.timing import spread

DTYPES = ("float32", "bfloat16")
ROUTES = ("training", "training, few tokens", "one token", "prefill")
PARTS = ("kernels", "host time")
_HEADS = ("training, 512 tokens", "training, 8 tokens", "one token", "prefill, 512 tokens")
_ESTIMATED = ("LoRA r=16", "LoRA r=1", "DoRA r=16", "VeRA r=256", "dvora dense r=256", "dvora structured r=256")


def with_overhead(speed: dict[str, Any], overhead: dict[str, Any]) -> dict[str, Any]:
    """The result of the speed benchmark with the rows of the overhead's own file in place of its own."""
    rows = [row for row in speed["rows"] if row["part"] not in PARTS]
    return {**speed, "rows": [*rows, *overhead["rows"]]}


def overhead(result: dict[str, Any]) -> dict[str, str]:
    """The parts of the page, by name."""
    rows, environment = result["rows"], result["environment"]
    source = f"`benchmarks/results/overhead.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU"
    of_kernels = [
        f"Kernels a layer beyond the frozen base's, float32 / bfloat16 ({source}; a Llama-shaped model of hidden size "
        "1,024 with 56 adapted linear layers), on the CPU:",
        "",
        *_kernels(rows, "cpu"),
        "",
        "The same layers off the CPU:",
        "",
        *_kernels(rows, "meta"),
        "",
        *missing([miss for miss in result["not_measured"] if miss["what"].startswith("kernels")]),
    ]
    return {
        "kernels": "\n".join(of_kernels),
        "host": "\n".join(
            [f"Microseconds a layer beyond the frozen base's, medians ({source}, one thread):", "", *_host(rows), ""]
        ),
        "estimate": "\n".join([*_estimate(rows, Assumptions()), ""]),
    }


def _kernels(rows: Rows, device: str) -> Iterator[str]:
    yield from _head(_HEADS)
    for arm in _arms(rows, part="kernels", device=device):
        cells = [
            [kernels_a_layer(row_of(rows, part="kernels", device=device, arm=arm, dtype=d, route=r)) for d in DTYPES]
            for r in ROUTES
        ]
        texts = [" / ".join("-" if found is None else f"{found.median:.1f}" for found in both) for both in cells]
        yield _line(arm, texts)


def _host(rows: Rows) -> Iterator[str]:
    settings = [{"route": route, "dtype": dtype} for dtype in DTYPES for route in ROUTES[1:3]]
    heads = [f"{setting['route']}, {setting['dtype']}" for setting in settings]
    yield from _head([text for head in heads for text in (head, "in VeRA's")])
    for arm in _arms(rows, part="host time"):
        texts = []
        for setting in settings:
            row = row_of(rows, part="host time", arm=arm, **setting)
            ratio = host_ratio(rows, arm, "VeRA r=16", **setting)
            texts.append("" if row is None else f"{spread(host_seconds(row)).median * 1e6:.0f}")
            texts.append("" if ratio is None else f"{ratio.median:.2f}")
        yield _line(arm, texts)


def _estimate(rows: Rows, given: Assumptions) -> Iterator[str]:
    """A 7B model's step, from what is counted off the CPU; attention and the rest of the base as counted on it."""
    setting = {"part": "kernels", "dtype": "bfloat16", "route": "training"}
    of_base = row_of(rows, arm=BASE.name, device="cpu", **setting)
    if of_base is None:
        return
    base_kernels = of_base["kernels"] / of_base["layers"]
    yield (
        f"An estimate, not a measurement: {given.layers} adapted layers with {given.weights / 1e9:.2f} billion weights "
        f"(hidden size {given.hidden:,}, intermediate {given.intermediate:,}, {given.blocks} blocks), {given.tokens} "
        f"tokens, bfloat16, eager mode. Assumed are {given.launch_seconds * 1e6:.0f} µs of the host for a launch and "
        f"{given.operations / 1e12:.0f} TFLOP/s in matrix products: the base's step, 4 operations a weight and token, "
        f"takes 4 x {given.weights / 1e9:.2f}e9 x {given.tokens} / {given.operations:.0e} = "
        f"{given.base_seconds * 1e3:.0f} ms. The base launches {base_kernels:.1f} kernels for each adapted layer. "
        f"{_of_a_kernel(rows)}"
    )
    yield ""
    yield from _head(["kernels a layer", "launches a step", "host, ms", "products, ms", "step at least, ms"])
    for arm in (BASE.name, *_ESTIMATED):
        row = row_of(rows, arm=arm, device="meta", **setting)
        found = kernels_a_layer(row)
        if row is None or found is None:
            yield _line(arm, ["not counted", "", "", "", ""])
            continue
        of_step = step(row["method"], row["rank"], found.median, base_kernels, given)
        times = (of_step.host_seconds, of_step.compute_seconds, of_step.seconds)
        yield _line(arm, [f"{found.median:.1f}", f"{of_step.launches:,.0f}", *(f"{time * 1e3:.0f}" for time in times)])


def _of_a_kernel(rows: Rows) -> str:
    """What the host took for a kernel where it was measured, beside what is assumed."""
    setting, found = {"route": "training, few tokens", "dtype": "bfloat16"}, []
    for arm in ("LoRA r=16", "DoRA r=16"):
        count = kernels_a_layer(row_of(rows, part="kernels", device="cpu", arm=arm, **setting))
        row = row_of(rows, part="host time", arm=arm, **setting)
        if count is not None and row is not None:
            found.append(f"{spread(host_seconds(row)).median / count.median * 1e6:.1f} µs a kernel in {arm}")
    return f"(On the CPU the host took {' and '.join(found)}.)" if found else ""


def _arms(rows: Rows, **setting: object) -> list[str]:
    chosen = (row["arm"] for row in rows if setting.items() <= row.items() and row["arm"] != BASE.name)
    return list(dict.fromkeys(chosen))


def _head(names: Sequence[str]) -> Iterator[str]:
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)


def _line(arm: str, cells: Sequence[str]) -> str:
    return f"| {arm} | " + " | ".join(cells) + " |"
