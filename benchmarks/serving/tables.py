"""The tables of serving on the page "Many adapters", from the result file."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.results import Row
from benchmarks.tables import table, text

SECTIONS = {
    "classify": ("merged model", "p95, ms"),
    "kinds": ("DVoRA r=64", "p95, ms"),
    "tenants": ("one process beside them, 16 adapters", "p95, ms"),
    "engines": ("vLLM, merged model", "first token p95, ms"),
}
"""Against what each is measured, and which latency matters."""
LEFT_OUT = ("adapter_names", "set_adapter", "dvora serve, 16 adapters", " 64 adapters")
"""Ends of rows that are not shown: what is measured no more, and what is between two others."""


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page."""
    rows = {row["key"]: row for row in result["rows"]}
    environment = result["environment"]
    blocks = []
    for work, (against, latency) in SECTIONS.items():
        measured = [row for key, row in rows.items() if key.startswith(f"{work}: ") and not key.endswith(LEFT_OUT)]
        reference = rows[f"{work}: {against}"]
        title = f"{work}: requests a second", "of the bold one's", latency, "MiB"
        blocks.append(table(("", *title), [_line(row, reference) for row in measured]))
    first, used = rows["others beside first uses"], rows["others beside used ones"]
    few, many = rows["classify: 16 adapters"], rows["classify: 1024 adapters"]
    memory = many["memory_mib"]
    return {
        "serving-in-short": text(
            f"- **More adapters than slots** (256): requests over HTTP for 1,024 adapters wait "
            f"{many['answer_ms_p95'] / few['answer_ms_p95']:.2f} times as long as for 16 (95th percentile), and "
            f"{many['requests_per_second'] / few['requests_per_second']:.2f} times as many are answered a second."
        ),
        "serving": text(
            *blocks,
            f"The p95 of requests for 16 adapters is {first['answer_ms_p95']:.0f} ms "
            f"beside first uses of others, and {used['answer_ms_p95']:.0f} beside as many requests for one in its "
            "slot. A server grows with the adapters that were used, up to `--host-memory`: with 1,024 of them from "
            f"{memory[0]:,} MiB after the first turn to {memory[-1]:,} after the last.",
            f"`benchmarks/results/serving.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU, one "
            "thread for the model, clients on the other core, servers in turns; ratios are medians in a turn. "
            "Adapters by Zipf's law (exponent 1), dvora structured r=64, 256 slots. MiniLM: sentences of 3 to 25 "
            "tokens, 32 requests under way; SmolLM2: 8, 16 tokens each. The 16 processes are merged models on one "
            "core. vLLM 0.32: float32, eager, one core. RoAd and (IA)3: measured while banks took them.",
        ),
    }


def _line(row: Row, reference: Row) -> tuple[str, ...]:
    ratio = statistics.median(own / other for own, other in zip(row["rates"], reference["rates"], strict=True))
    name, latency = row["key"].partition(": ")[2], row.get("first_token_ms_p95", row["answer_ms_p95"])
    shown = f"**{name}**" if row is reference else name
    numbers = f"{row['requests_per_second']:.1f}", f"{ratio:.2f}", f"{latency:,.0f}"
    return (shown, *numbers, f"{row['memory_mib'][-1]:,}")
