"""The tables of the page "Overhead", from the result file of `benchmarks.speed.overhead`."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.speed.arms import BASE
from benchmarks.speed.metrics import Rows, host_ratio, host_seconds, kernels_a_layer, row_of
from benchmarks.speed.tables import missing
from benchmarks.speed.timing import spread

DTYPES = ("float32", "bfloat16")
ROUTES = ("training", "training, few tokens", "one token", "prefill")
_HEADS = ("training, 512 tokens", "training, 8 tokens", "one token", "prefill, 512 tokens")


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


def _arms(rows: Rows, **setting: object) -> list[str]:
    chosen = (row["arm"] for row in rows if setting.items() <= row.items() and row["arm"] != BASE.name)
    return list(dict.fromkeys(chosen))


def _head(names: Sequence[str]) -> Iterator[str]:
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)


def _line(arm: str, cells: Sequence[str]) -> str:
    return f"| {arm} | " + " | ".join(cells) + " |"
