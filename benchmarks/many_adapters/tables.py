"""Tables of many adapters, for their page; from the result file."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.many_adapters.numbers import KNOWN, MANY, ROWS, SLOTS
from benchmarks.many_adapters.targets import DECODED, KINDS, READ, SMALL, TOKEN, all_targets, bank_arm, p95_ratio
from benchmarks.speed.metrics import Rows, row_of, time_ratio
from benchmarks.speed.tables import missing, written
from benchmarks.speed.timing import Spread, spread

COLUMNS: dict[str, dict[str, object]] = {
    "linear layers, one token": DECODED,
    "... bfloat16": {**DECODED, "dtype": "bfloat16"},
    "MiniLM, 32 tokens": READ,
    "MiniLM, bfloat16": {**READ, "dtype": "bfloat16"},
    "SmolLM2, one token": TOKEN,
    "SmolLM2, prompts of 4 tokens": {**TOKEN, "part": "prefill"},
}
LORAS = ("LoRA r=8", "LoRA r=1")
WAYS = {
    **{f"bank, {kind}": ("bank", kind) for kind in (SMALL, *KINDS)},
    **{f"`adapter_names`, {name}": ("adapter_names", name) for name in (SMALL, KINDS[0], *LORAS)},
    **{f"gathered, {name}": ("gathered", name) for name in LORAS},
}
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}


def parts(result: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the page, by name."""
    rows, environment = result["rows"], result["environment"]
    of_machine = (
        f"`benchmarks/results/many_adapters.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU, "
        f"{environment['threads']} threads"
    )
    made = {
        "many-in-short": in_short(rows),
        "many-targets": targets(rows),
        "many-batches": batches(rows, of_machine),
        "many-training": training(rows),
        "many-stream": stream(rows),
        "many-storage": storage(rows),
        "many-loading": loading(rows),
        "many-missing": [*(f"- {each}" for each in result["left_out"]), "", *missing(result["not_measured"])],
    }
    return {name: "\n".join(lines).rstrip() + "\n" for name, lines in made.items()}


def in_short(rows: Rows) -> list[str]:
    """What the page says first, with the numbers that there are."""
    sentences = [
        _sentence(
            "**Another adapter in every row** takes {} the time of one adapter for all 64", _to_one(rows, "bank")
        ),
        _sentence("... through PEFT's `adapter_names`: dvora {}", _to_one(rows, "adapter_names")),
        _sentence("... through PEFT's `adapter_names`: LoRA {}", _to_one(rows, "adapter_names", LORAS)),
        _sentence(
            "**Beside the frozen base**, 64 adapters and one token a row at width 1,024: the bank {} with r=64, {} "
            "with r=256 and {} with dense matrices, our own gathered LoRA {} with r=8 and {} with r=1",
            [
                time_ratio(rows, arm, "base", **DECODED)
                for arm in (
                    *(bank_arm(kind, ROWS, MANY) for kind in (SMALL, *KINDS)),
                    *(f"gathered, {lora}, {ROWS} of {ROWS}" for lora in LORAS),
                )
            ],
        ),
        _sentence(
            f"**More adapters than slots**: with {SLOTS} slots the latency's 95th percentile is {{}} times that of 16 "
            "adapters when requests ask for 1,024 and {} for 10,000; {} and {} with first uses among the requests",
            [p95_ratio(rows, "closed", asked, used) for used in (True, False) for asked in (MANY, 10_000)],
        ),
    ]
    return [f"- {sentence}." for sentence in sentences if sentence]


def targets(rows: Rows) -> list[str]:
    """The targets, and whether they are met."""
    lines = ["| measure | target | median | quartiles | met |", "|---|---|---|---|---|"]
    for target in all_targets(rows):
        limit = f"| {target.metric} | ≤ {written(target.limit, target.unit)} |"
        if target.measured is None:
            lines.append(f"{limit} not measured | | |")
            continue
        low, median, high = (written(value, target.unit) for value in target.measured)
        quartiles = f"{low} to {high}" if low != high else ""
        lines.append(f"{limit} {median} | {quartiles} | {'yes' if target.met else 'no'} |")
    return lines


def batches(rows: Rows, of_machine: str) -> list[str]:
    """A batch with one adapter and with as many as rows; then what the numbers of adapters change."""
    return [
        f"Time of a batch of {ROWS} rows in units of the frozen base's, with one adapter for all rows / with another "
        f"one in every row; medians of ratios within a round ({of_machine}; float32 unless noted):",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
        "| one merged adapter | " + " | ".join(_cell(rows, "merged", s) for s in COLUMNS.values()) + " |",
        *(f"| {label} | " + " | ".join(_pairs(rows, *way)) + " |" for label, way in WAYS.items()),
        "",
        f"Through the bank, by the number of different adapters in the batch and by how many the bank knows ({MANY:,} "
        "in the first three columns):",
        "",
        f"| | 1 | 16 | {ROWS} | " + " | ".join(f"{ROWS} of {known:,}" for known in KNOWN if known != MANY) + " |",
        "|---|" + "---|" * (3 + len(KNOWN) - 1),
        *(
            f"| {label}, {kind} | " + " | ".join(_cell(rows, arm, setting) for arm in _numbers(kind)) + " |"
            for label, setting in {"linear layers, one token": DECODED, "MiniLM": READ}.items()
            for kind in KINDS
        ),
    ]


def training(rows: Rows) -> list[str]:
    """What it costs that every row trains another adapter."""
    found = [row for row in rows if row["part"] == "training"]
    if not found:
        return []
    first, kind = found[0], KINDS[0]
    to = f"alone, {kind}, 1 of {ROWS}"
    labels = {
        f"bank, {kind}, 1 of {ROWS}": "the bank, one tenant",
        f"bank, {kind}, {ROWS} of {ROWS}": f"the bank, {ROWS} tenants",
        f"alone, {kind}, {ROWS} of {ROWS}": f"PEFT, {ROWS} tenants one after the other",
    }
    cells = {label: time_ratio(found, arm, to) for arm, label in labels.items()}
    return [
        f"A step (forward, backward, AdamW) of MiniLM on {first['batch']} rows of {first['tokens']} tokens, in units "
        f"of PEFT's with one adapter, {kind}:",
        "",
        "| | time |",
        "|---|---|",
        *(f"| {label} | {ratio.median:.2f} |" for label, ratio in cells.items() if ratio is not None),
    ]


def stream(rows: Rows) -> list[str]:
    """Throughput and latencies."""
    found = [row for row in rows if row["part"] == "stream"]
    if not found:
        return []
    first = found[0]
    lines = [
        f"Sentences of {first['tokens']} tokens through MiniLM, at most {first['batch']} in a batch, {first['slots']} "
        f"slots; banks know the {max(row['asked'] for row in found):,} adapters of one pack (float16), and requests "
        f"ask for some by Zipf's law (exponent {first['exponent']:g}). Closed loop: two batches of requests are always "
        f"under way. Open loop: requests come at random, {_offered(found)} a second, and those who find "
        f"{_waiting(found)} before them are refused. Medians of rounds of {first['requests']} requests; the 99th "
        "percentile is of all rounds together:",
        "",
        "| asked for | closed: a second | p50, ms | p95, ms | p99, ms | open: p50, ms | p95, ms | p99, ms | refused |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for asked, used in dict.fromkeys((row["asked"], row["used"]) for row in found):
        closed, opened = (row_of(found, loop=loop, asked=asked, used=used) for loop in ("closed", "open"))
        if closed is not None and opened is not None:
            cells = [f"{spread(closed['per_second']).median:.0f}", *_latencies(closed), *_latencies(opened)]
            name = f"{asked:,}{', all used before' if used else ''}" if asked else "none: the base"
            lines.append(f"| {name} | {' | '.join(cells)} | {opened['refused']:,} |")
    return lines


def storage(rows: Rows) -> list[str]:
    """Bytes of an adapter, and of a process with ten thousand."""
    lines = [
        "Kilobytes an adapter. In a slot of the device and on the host it is the same rows; a pack holds both files of "
        "an adapter, what is equal in many only once:",
        "",
        "| | values | device or host, float16 | float32 | folder | pack |",
        "|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["part"] == "storage"):
        sizes = (row.get(name) for name in ("float16", "float32", "folder", "pack"))
        cells = ("" if size is None else f"{size / 1e3:,.0f}" for size in sizes)
        model = MODELS.get(row["workload"], row["workload"])
        lines.append(f"| {model}, {row['arm']} | {row['values']:,} | {' | '.join(cells)} |")
    return [*lines, "", *resident(rows)]


def resident(rows: Rows) -> list[str]:
    """What processes grew by."""
    lines = []
    for row in (row for row in rows if row["part"] == "resident"):
        grown = (row["after_bytes"] - row["before_bytes"]) / 1e6
        lines.append(
            f"- {row['known']:,} adapters of MiniLM known and each used once, {row['slots']} slots, at most "
            f"{row['host_bytes'] / 1e6:,.0f} MB on the host: the process grew by {grown:,.0f} MB, of which "
            f"{(row['added_bytes'] - row['before_bytes']) / 1e6:,.0f} MB before the first was used."
        )
    return lines


def loading(rows: Rows) -> list[str]:
    """Milliseconds until an adapter is known, is used first, is used again."""
    found = [row for row in rows if row["part"] == "loading"]
    workloads = list(dict.fromkeys(row["workload"] for row in found))
    names = [MODELS.get(workload, workload) for workload in workloads]
    lines = ["Milliseconds, medians (slowest):", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(workloads)]
    for arm, what in dict.fromkeys((row["arm"], row["what"]) for row in found):
        cells = (_milliseconds(row_of(found, workload=workload, arm=arm, what=what)) for workload in workloads)
        lines.append(f"| {arm}: {what} | {' | '.join(cells)} |")
    return lines if found else []


def _sentence(text: str, ratios: Sequence[Spread | None]) -> str:
    """A sentence with ratios put in; the smallest and the largest where it has one place for several."""
    medians = [ratio.median for ratio in ratios if ratio is not None]
    if not medians or (text.count("{}") > 1 and len(medians) < len(ratios)):
        return ""
    if text.count("{}") > 1:
        return text.format(*(f"{median:.2f}" for median in medians))
    low, high = f"{min(medians):.2f}", f"{max(medians):.2f}"
    return text.format(f"{low} times" if low == high else f"{low} to {high} times")


def _to_one(rows: Rows, way: str, adapters: Sequence[str] = (SMALL, *KINDS)) -> list[Spread | None]:
    """Time with 64 adapters in that with one, in all settings."""
    return [
        time_ratio(rows, *(f"{way}, {adapter}, {distinct} of {known:,}" for distinct in (ROWS, 1)), **setting)
        for adapter in adapters
        for setting in COLUMNS.values()
        for known in (MANY, ROWS)
    ]


def _cell(rows: Rows, arm: str, setting: dict[str, object]) -> str:
    ratio = time_ratio(rows, arm, "base", **setting)
    return "" if ratio is None else f"{ratio.median:.2f}"


def _pairs(rows: Rows, way: str, adapter: str) -> Iterator[str]:
    """With one adapter and with one a row, for each column."""
    for setting in COLUMNS.values():
        known = next((n for n in (MANY, ROWS) if _cell(rows, f"{way}, {adapter}, {ROWS} of {n:,}", setting)), ROWS)
        both = [_cell(rows, f"{way}, {adapter}, {distinct} of {known:,}", setting) for distinct in (1, ROWS)]
        yield " / ".join(both) if all(both) else ""


def _numbers(kind: str) -> list[str]:
    few = [bank_arm(kind, distinct, MANY) for distinct in (1, 16, ROWS)]
    return [*few, *(bank_arm(kind, ROWS, known) for known in KNOWN if known != MANY)]


def _latencies(row: dict[str, Any]) -> Iterator[str]:
    yield from (f"{spread(row[name]).median * 1e3:.0f}" for name in ("p50", "p95"))
    yield f"{row['together']['p99'] * 1e3:.0f}"


def _offered(rows: Rows) -> str:
    return ", ".join({f"{row['offered_per_second']:.0f}" for row in rows if row["loop"] == "open"})


def _waiting(rows: Rows) -> str:
    return ", ".join({f"{row['waiting']}" for row in rows if row["loop"] == "open"})


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    median, slowest = spread(row["seconds"]).median * 1e3, max(row["seconds"]) * 1e3
    return f"{median:.3g}" + (f" ({slowest:.3g})" if len(row["seconds"]) > 1 else "")
