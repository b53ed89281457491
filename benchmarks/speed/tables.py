"""The tables of the page "Speed" and of the benchmarks' own, from the result files."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import Row
from benchmarks.speed.metrics import Rows, row_of, time_ratio
from benchmarks.speed.timing import spread
from benchmarks.tables import table, text

_TRAINING = {"part": "training", "dtype": "float32", "batch": 1}
_DECODING = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
COLUMNS: Mapping[str, dict[str, object]] = {
    "linear layers, 512 tokens": {**_TRAINING, "workload": "linears-1024", "tokens": 512},
    "4,096 tokens": {**_TRAINING, "workload": "linears-1024", "tokens": 4096},
    "Llama block, 512 tokens": {**_TRAINING, "workload": "llama-1024", "tokens": 512},
    "bfloat16": {**_TRAINING, "workload": "llama-1024", "tokens": 512, "dtype": "bfloat16"},
    "prompt, 512 tokens": {"part": "prefill", "workload": "llama-1024", "dtype": "float32"},
    "one token": {**_DECODING, "batch": 1},
    "16 rows of a token": {**_DECODING, "batch": 16},
}
ARMS = (
    *("full fine-tuning", "LoRA r=16", "LoRA r=8", "LoRA r=1", "RoAd", "DoRA r=16", "VeRA r=256", "RandLoRA r=32"),
    *("dvora structured r=64", "dvora structured r=256", "dvora structured r=1024", "dvora dense r=256"),
    *("dvora dense r=1024", "dvora merged r=256"),
)
FEW_ARMS = (
    *("LoRA r=16", "LoRA r=1", "DoRA r=16", "VeRA r=256"),
    *("dvora structured r=64", "dvora structured r=256", "dvora dense r=256"),
)
MODELS: Mapping[str, dict[str, object]] = {
    "seven linear layers, hidden 2,048": {**_TRAINING, "workload": "linears-2048", "tokens": 512},
    "a Llama block, hidden 2,048": {**_TRAINING, "workload": "llama-2048", "tokens": 512},
    "... 2,048 tokens": {**_TRAINING, "workload": "llama-2048", "tokens": 2048},
    "MiniLM, 16 x 32 tokens": {**_TRAINING, "workload": "minilm", "batch": 16},
    "... 64 x 32 tokens": {**_TRAINING, "workload": "minilm", "batch": 64},
    "SmolLM2-135M, 128 tokens": {**_TRAINING, "workload": "smollm2"},
}
ROUTES: Mapping[str, dict[str, object]] = {
    "training": {"part": "training", "tokens": 512},
    "training, 8 tokens": {"part": "training", "tokens": 8},
    "one token": {"part": "prefill", "tokens": 1},
}
SMALL_RANKS = {
    "VeRA r=256": "VeRA r=16",
    "dvora structured r=256": "dvora structured r=16",
    "dvora dense r=256": "dvora dense r=16",
}
"""The host's time was taken in a model of hidden size 64, which has no room for rank 256."""


def speed(result: Mapping[str, Any]) -> dict[str, str]:
    """Times and memory of all methods, then of larger and of whole models, in units of the frozen base's."""
    rows, environment = result["rows"], result["environment"]
    cells = {arm: [*(_ratio(rows, arm, setting) for setting in COLUMNS.values()), *_memory(rows, arm)] for arm in ARMS}
    methods = text(
        table(("", *COLUMNS, "kept, MB", "process, MB"), ((arm, *shown) for arm, shown in cells.items() if any(shown))),
        f"Medians of ratios within a round (`benchmarks/results/speed.json`; torch {environment['torch']}, PEFT "
        f"{environment['peft']}, CPU, {environment['threads']} threads), hidden size 1,024, float32 unless "
        "noted. Kept: for the backward pass, by the linear layers at 2,048 tokens. Process: its growth when it adapts "
        "them and trains on 4,096 tokens.",
    )
    arms = (*FEW_ARMS, "RoAd")
    models = ((label, *(_ratio(rows, arm, setting) for arm in arms)) for label, setting in MODELS.items())
    return {"speed": methods, "models": text(table(("", *arms), models), *missing(result))}


def overhead(result: Mapping[str, Any]) -> str:
    """What a method adds to every layer whatever its size: kernels, and the host's time to launch them."""
    rows: Rows = result["rows"]
    lines = []
    for arm in FEW_ARMS:
        cells = [_kernels(rows, arm, workload="llama-1024", **route) for route in ROUTES.values()]
        for route in list(ROUTES.values())[1:]:
            cells.append(_microseconds(rows, SMALL_RANKS.get(arm, arm), workload="llama-64", **route))
        lines.append((arm, *cells))
    heads = [f"kernels, {name}" for name in ROUTES] + [f"µs, {name}" for name in list(ROUTES)[1:]]
    return text(table(("", *heads), lines))


def _kernels(rows: Rows, arm: str, **setting: object) -> str:
    row, base = (row_of(rows, arm=name, **setting) for name in (arm, "base"))
    return "" if row is None or base is None else f"{(row['kernels'] - base['kernels']) / row['layers']:.1f}"


def _microseconds(rows: Rows, arm: str, **setting: object) -> str:
    row, base = (row_of(rows, arm=name, **setting) for name in (arm, "base"))
    if row is None or base is None:
        return ""
    pairs = zip(row["seconds"], base["seconds"], strict=True)
    return f"{1e6 * spread([seconds - of_base for seconds, of_base in pairs]).median / row['layers']:.0f}"


def missing(result: Mapping[str, Any]) -> list[str]:
    """What could not be measured, one line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for miss in result["not_measured"]:
        by_reason.setdefault(miss["reason"], []).append(miss["what"])
    lines = [f"- {'; '.join(what)}: {reason}" for reason, what in by_reason.items()]
    return ["Not measured:", "\n".join(lines)] if lines else []


def _ratio(rows: Rows, arm: str, setting: Mapping[str, object]) -> str:
    ratio = time_ratio(rows, arm, "base", **setting)
    return "" if ratio is None else f"{ratio.median:.2f}"


def _memory(rows: Rows, arm: str) -> Sequence[str]:
    kept: Row | None = row_of(rows, part="memory", workload="linears-1024", dtype="float32", arm=arm)
    process = row_of(rows, part="resident", arm=arm)
    return (
        "" if kept is None else f"{kept['saved_bytes'] / 1e6:,.0f}",
        "" if process is None else f"{(process['most_bytes'] - process['before_bytes']) / 1e6:,.0f}",
    )
