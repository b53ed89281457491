"""The table of serving on the page "Many adapters", from the result file."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.results import Row
from benchmarks.tables import table, text


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of the page."""
    rows = {row["key"]: row for row in result["rows"]}
    environment = result["environment"]
    blocks = []
    for work, head in (("classify", "p95, ms"), ("generate", "first token p95, ms")):
        merged = rows[f"{work}: merged model"]
        lines = [_line(row, merged, work) for key, row in rows.items() if key.startswith(f"{work}: ")]
        blocks.append(table((work, "a second", "of the merged model's", head, "share in batches", "MiB"), lines))
    update, first, used = (
        rows[key] for key in ("update: SmolLM2 by a flat vector", "others beside first uses", "others beside used ones")
    )
    return {
        "serving": text(
            *blocks,
            f"An update by a vector of {update['bytes'] / 1e6:.1f} MB in the request takes "
            f"{update['answer_ms_p50']:.0f} ms (p95 {update['answer_ms_p95']:.0f}). The p95 of requests for 16 "
            f"adapters is {first['answer_ms_p95']:.0f} ms beside first uses of others, and "
            f"{used['answer_ms_p95']:.0f} beside as many requests for one in its slot.",
            f"`benchmarks/results/serving.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU, one "
            "thread for the model, clients on the other core, servers asked in turns; ratios are medians in a turn. "
            "Adapters by Zipf's law (exponent 1), dvora structured r=64: one that was trained, and perturbations of "
            "it; heads of 2, 3, 5 and 8 classes, 256 slots. LoRA by PEFT through the same server, in one batch by "
            "`adapter_names` or one adapter after another. MiniLM on sentences of 3 to 25 tokens with 32 requests "
            "under way; SmolLM2 with 8, 16 tokens each. One process a tenant would take the memory of the merged "
            "model's for every tenant.",
        )
    }


def _line(row: Row, merged: Row, work: str) -> tuple[str, ...]:
    ratio = statistics.median(own / other for own, other in zip(row["rates"], merged["rates"], strict=True))
    latency = row["answer_ms_p95"] if work == "classify" else row["first_token_ms_p95"]
    name = row["key"].partition(": ")[2]
    numbers = f"{row['requests_per_second']:.1f}", f"{ratio:.2f}", f"{latency:,.0f}"
    return (name, *numbers, f"{row['share_in_batches']:.2f}", f"{row['memory_mib']:,}")
