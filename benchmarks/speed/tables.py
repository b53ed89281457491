"""Tables of times, memory and targets, for the page "Speed" and the benchmarks' own; from the result file."""

from collections.abc import Sequence
from typing import Any

from benchmarks.speed.metrics import Rows, row_of, time_ratio
from benchmarks.speed.targets import Target, all_targets

_TRAINING = {"part": "training", "dtype": "float32", "batch": 1}
_DECODING = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
COLUMNS: dict[str, dict[str, object]] = {
    "linear layers, 512 tokens": {**_TRAINING, "workload": "linears-1024", "tokens": 512},
    "4,096 tokens": {**_TRAINING, "workload": "linears-1024", "tokens": 4096},
    "Llama block, 512 tokens": {**_TRAINING, "workload": "llama-1024", "tokens": 512},
    "bfloat16": {**_TRAINING, "workload": "llama-1024", "tokens": 512, "dtype": "bfloat16"},
    "prefill, 512 tokens": {"part": "prefill", "workload": "llama-1024", "dtype": "float32"},
    "decode, batch 1": {**_DECODING, "batch": 1},
    "batch 16": {**_DECODING, "batch": 16},
}
ARMS = (
    *("full fine-tuning", "LoRA r=16", "LoRA r=1", "DoRA r=16", "VeRA r=256", "VeRA r=1024", "RandLoRA r=32"),
    *("dvora structured r=64", "dvora structured r=256", "dvora structured r=1024", "dvora dense r=256"),
    *("dvora dense r=1024", "dvora merged r=256"),
)


FEW_ARMS = (
    *("LoRA r=16", "LoRA r=1", "DoRA r=16", "VeRA r=256"),
    *("dvora structured r=64", "dvora structured r=256", "dvora dense r=256"),
)
MORE: dict[str, dict[str, object]] = {
    "seven linear layers, hidden 2,048": {**_TRAINING, "workload": "linears-2048", "tokens": 512},
    "a Llama block, hidden 2,048": {**_TRAINING, "workload": "llama-2048", "tokens": 512},
    "... at 2,048 tokens": {**_TRAINING, "workload": "llama-2048", "tokens": 2048},
    "MiniLM, 16 x 32 tokens": {**_TRAINING, "workload": "minilm", "batch": 16},
    "... 64 x 32 tokens": {**_TRAINING, "workload": "minilm", "batch": 64},
    "SmolLM2-135M, 128 tokens": {**_TRAINING, "workload": "smollm2"},
}


def speed(result: dict[str, Any]) -> str:
    """Times and memory of all methods, times in units of the frozen base's."""
    rows, environment = result["rows"], result["environment"]
    lines = [
        "Times in units of the frozen base's, medians of ratios within a round (`benchmarks/results/speed.json`; "
        f"torch {environment['torch']}, PEFT {environment['peft']}, CPU, {environment['threads']} "
        "threads; hidden size 1,024, all linear layers adapted, float32 unless noted). A training step of the base "
        "computes its output and the gradient of its input; of all others, also the gradients of what is trained:",
        "",
        "| | " + " | ".join(COLUMNS) + " | kept for backward, MB | resident, MB |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
        *(f"| {arm} | " + " | ".join(cells) + " |" for arm in ARMS if any(cells := _cells(rows, arm))),
        "",
        "Training steps of larger and of whole models, in the same units:",
        "",
        "| | " + " | ".join(FEW_ARMS) + " |",
        "|---|" + "---|" * len(FEW_ARMS),
        *(f"| {label} | " + " | ".join(_medians(rows, setting)) + " |" for label, setting in MORE.items()),
        "",
        *beside_adapterhub(rows),
        "Kept for backward: by the seven linear layers at 2,048 tokens. Resident: the growth of a process that adapts "
        "them and trains on 4,096 tokens, the base's own activations included.",
        "",
        *missing(result["not_measured"]),
    ]
    return "\n".join(lines)


def targets(rows: Rows) -> str:
    """The targets, and whether they are met, from the rows of the speed and of the overhead."""
    lines = [
        "| measure | target | median | quartiles | met |",
        "|---|---|---|---|---|",
        *(_target_line(target) for target in all_targets(rows)),
    ]
    return "\n".join(lines) + "\n"


def beside_adapterhub(rows: Rows) -> list[str]:
    """AdapterHub's DVoRA on its own ground."""
    timed = [row for row in rows if row["part"] == "adapterhub" and row["method"] != "base"]
    if not timed:
        return []
    found = {row["arm"]: time_ratio(rows, row["arm"], "base", part="adapterhub") for row in timed}
    parts = [f"{arm} {ratio.median:.2f}" for arm, ratio in found.items() if ratio is not None]
    versions = timed[0]["environment"]
    sentence = (
        f"AdapterHub's DVoRA (adapters {versions['adapters']}, transformers {versions['transformers']}) adapts square "
        "layers only; on a BERT block of 1,024 x 1,024 layers, 512 tokens: "
    )
    return [f"{sentence}{', '.join(parts)}.", ""]


def _medians(rows: Rows, setting: dict[str, object]) -> list[str]:
    found = [time_ratio(rows, arm, "base", **setting) for arm in FEW_ARMS]
    return ["" if ratio is None else f"{ratio.median:.2f}" for ratio in found]


def _cells(rows: Rows, arm: str) -> list[str]:
    times = [time_ratio(rows, arm, "base", **setting) for setting in COLUMNS.values()]
    row = row_of(rows, part="memory", workload="linears-1024", dtype="float32", arm=arm)
    kept = "" if row is None else _megabytes(max(row["held_bytes"], row["saved_bytes"]))
    process = row_of(rows, part="resident", arm=arm)
    resident = "" if process is None else _megabytes(process["most_bytes"] - process["before_bytes"])
    return [*("" if t is None else f"{t.median:.2f}" for t in times), kept, resident]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f}"


def _target_line(target: Target) -> str:
    limit = f"{'≥' if target.at_least else '≤'} {written(target.limit, target.unit)}"
    if target.measured is None:
        return f"| {target.metric} | {limit} | not measured | | |"
    low, median, high = (written(value, target.unit) for value in target.measured)
    quartiles = f"{low} to {high}" if low != high else ""
    cells = [target.metric, limit, median, quartiles, "yes" if target.met else "no"]
    return f"| {' | '.join(cells)} |"


def written(value: float, unit: str) -> str:
    """A number with its unit; milliseconds are given as seconds."""
    return {
        "times": f"{value:.3g}",
        "share": f"{value:.1%}",
        "seconds": f"{value:.2g} s",
        "milliseconds": f"{value * 1e3:.3g} ms",
        "gigabytes": f"{value:.2f} GB",
        "count": f"{value:.1f}",
    }[unit]


def missing(not_measured: Sequence[dict[str, str]]) -> list[str]:
    """One sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for miss in not_measured:
        by_reason.setdefault(miss["reason"], []).append(miss["what"])
    lines = [f"- {'; '.join(what)}: {reason}" for reason, what in by_reason.items()]
    return ["Not measured:", "", *lines, ""] if lines else []
