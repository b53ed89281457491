"""The tables of the page "Many adapters", from the result file."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.many_adapters.plan import MANY, ROWS
from benchmarks.many_adapters.targets import DECODED, KINDS, MODELS, READ, SMALL, TOKEN, bank_arm
from benchmarks.results import Row
from benchmarks.speed.metrics import Rows, row_of, time_ratio
from benchmarks.speed.tables import missing
from benchmarks.speed.timing import Spread, spread
from benchmarks.tables import kilobytes, table, text

COLUMNS: Mapping[str, dict[str, object]] = {
    "linear layers, one token": DECODED,
    "... bfloat16": {**DECODED, "dtype": "bfloat16"},
    "MiniLM, 32 tokens": READ,
    "MiniLM, bfloat16": {**READ, "dtype": "bfloat16"},
    "SmolLM2, one token": TOKEN,
    "SmolLM2, 4 tokens": {**TOKEN, "part": "prefill"},
}
LORAS = ("LoRA r=8", "LoRA r=1")
WAYS = {
    **{f"bank, {kind}": ("bank", kind) for kind in (SMALL, *KINDS)},
    **{f"`adapter_names`, {name}": ("adapter_names", name) for name in (SMALL, KINDS[0], *LORAS)},
    **{f"batched products, {name}": ("gathered", name) for name in LORAS},
}
LOADED = ("bank, dvora structured r=64", "PEFT, dvora structured r=64", "PEFT, LoRA r=8")


def parts(result: Mapping[str, Any]) -> dict[str, str]:
    """The generated parts of the page, by name."""
    rows, environment = result["rows"], result["environment"]
    source = (
        f"`benchmarks/results/many_adapters.json`; torch {environment['torch']}, PEFT {environment['peft']}, CPU, "
        f"{environment['threads']} threads"
    )
    return {
        "many-in-short": text(_in_short(rows)),
        "many-batches": _batches(rows, source),
        "many-training": _training(rows),
        "one-text": _one_text(rows),
        "many-resident": _resident(rows),
        "many-loading": text(_loading(rows).rstrip(), *missing(result)),
    }


def _in_short(rows: Rows) -> list[str]:
    beside_base = [
        *(time_ratio(rows, bank_arm(kind, ROWS, MANY), "base", **DECODED) for kind in (SMALL, KINDS[0])),
        *(time_ratio(rows, f"gathered, {lora}, {ROWS} of {ROWS}", "base", **DECODED) for lora in LORAS),
    ]
    bank, of_64, of_256, of_lora_8, of_lora_1 = (
        _range(_to_one(rows, "bank", (SMALL, *KINDS))),
        *map(_median, beside_base),
    )
    return [
        f"- **Another adapter in every row** takes {bank} times the time of one adapter for all 64; through PEFT's "
        f"`adapter_names` {_range(_to_one(rows, 'adapter_names', (SMALL, KINDS[0])))} times with dvora and "
        f"{_range(_to_one(rows, 'adapter_names', LORAS))} with LoRA.",
        f"- **Beside the frozen base**, 64 adapters and one token a row at width 1,024: {of_64} with r=64 and "
        f"{of_256} with r=256; the fastest LoRA that we could write {of_lora_8} with r=8 and {of_lora_1} with r=1.",
    ]


def _batches(rows: Rows, source: str) -> str:
    merged = ("one merged adapter", *(_to_base(rows, "merged", setting) for setting in COLUMNS.values()))
    ways = ((label, *(_pair(rows, *way, setting) for setting in COLUMNS.values())) for label, way in WAYS.items())
    known = (
        _to_base(rows, bank_arm(KINDS[0], distinct, count), DECODED)
        for distinct, count in ((ROWS, ROWS), (ROWS, 10_000))
    )
    all_known, thousands = known
    return text(
        table(("", *COLUMNS), [merged, *ways]),
        f"A batch of {ROWS} rows in the frozen base's time, with one adapter for all rows / with another in every "
        f"row; medians of ratios within a round ({source}; float32 unless noted). How many adapters the bank has "
        f"changes nothing: with r=256 and one token a row {ROWS} take {all_known} alone and {thousands} among 10,000.",
    )


def _training(rows: Rows) -> str:
    of_training = [row for row in rows if row["part"] == "training"]
    first, kind = of_training[0], KINDS[0]
    to = f"alone, {kind}, 1 of {ROWS}"
    shown = {
        "in the bank, one adapter": f"bank, {kind}, 1 of {ROWS}",
        f"in the bank, {ROWS} adapters": f"bank, {kind}, {ROWS} of {ROWS}",
        f"in PEFT, {ROWS} adapters one after the other": f"alone, {kind}, {ROWS} of {ROWS}",
    }
    times = ", ".join(f"{label} {_median(time_ratio(of_training, arm, to))}" for label, arm in shown.items())
    return text(
        f"A step (forward, backward, AdamW) of MiniLM on {first['batch']} rows of {first['tokens']} tokens, {kind}, in "
        f"units of PEFT's with one adapter: {times}."
    )


def _one_text(rows: Rows) -> str:
    of_text = [row for row in rows if row["part"] == "one text"]
    asked = [row for row in of_text if row["way"] != "base"]
    settings = dict.fromkeys((row["workload"], row["tokens"], row["classifiers"]) for row in asked)
    ways = dict.fromkeys(row["way"] for row in asked)
    lines = [
        (
            f"{encoder}, {tokens} tokens, {count}",
            *(
                _median(time_ratio(of_text, f"{way}, {count}", "base, 1", workload=encoder, tokens=tokens))
                for way in ways
            ),
        )
        for encoder, tokens, count in settings
    ]
    return text(
        table(("encoder, text, classifiers", *ways), lines),
        f"In passes of the base over one text, DVoRA r=256 in the last {of_text[0]['last']} blocks. As rows: as many "
        "different texts, of which nothing is shared. Heads alone: adapters that change no block. BERT-base has "
        "random values.",
    )


def storage(result: Mapping[str, Any]) -> str:
    """Bytes of an adapter, as a table for the benchmarks' README."""
    lines = (
        (
            f"{MODELS[row['workload']]}, {row['arm']}",
            *(kilobytes(row.get(name)) for name in ("float16", "folder", "pack")),
        )
        for row in result["rows"]
        if row["part"] == "storage"
    )
    return text(table(("kB an adapter", "device or host, float16", "folder", "in a pack"), lines))


def _resident(rows: Rows) -> str:
    rows = [row for row in rows if row["part"] == "resident"]
    grown = ", by ".join(
        f"{(row['after_bytes'] - row['before_bytes']) / 1e6:,.0f} MB with {row['slots']} slots and at most "
        f"{row['host_bytes'] / 1e6:,.0f} MB on the host"
        for row in rows
    )
    return text(f"{rows[0]['known']:,} adapters of MiniLM, each used once, make a process grow by {grown}.")


def _loading(rows: Rows) -> str:
    """Milliseconds until an adapter is known, is used first, is used again."""
    of_loading = [row for row in rows if row["part"] == "loading"]
    lines = (
        (f"{arm}: {what}", *(_milliseconds(row_of(of_loading, workload=model, arm=arm, what=what)) for model in MODELS))
        for arm in LOADED
        for what in dict.fromkeys(row["what"] for row in of_loading if row["arm"] == arm)
    )
    return text(table(("median ms (slowest)", *MODELS.values()), lines))


def _to_one(rows: Rows, way: str, adapters: Sequence[str]) -> list[Spread | None]:
    """Time with 64 adapters in that with one, in all settings."""
    return [
        time_ratio(rows, *(f"{way}, {adapter}, {distinct} of {known:,}" for distinct in (ROWS, 1)), **setting)
        for adapter in adapters
        for setting in COLUMNS.values()
        for known in (MANY, ROWS)
    ]


def _range(ratios: Sequence[Spread | None]) -> str:
    medians = [ratio.median for ratio in ratios if ratio is not None]
    return f"{min(medians):.2f} to {max(medians):.2f}"


def _median(ratio: Spread | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.2f}"


def _to_base(rows: Rows, arm: str, setting: Mapping[str, object]) -> str:
    ratio = time_ratio(rows, arm, "base", **setting)
    return "" if ratio is None else f"{ratio.median:.2f}"


def _pair(rows: Rows, way: str, adapter: str, setting: Mapping[str, object]) -> str:
    """With one adapter and with one a row."""
    for known in (MANY, ROWS):
        both = [_to_base(rows, f"{way}, {adapter}, {distinct} of {known:,}", setting) for distinct in (1, ROWS)]
        if all(both):
            return " / ".join(both)
    return ""


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    median, slowest = spread(row["seconds"]).median * 1e3, max(row["seconds"]) * 1e3
    digits = ",.3g" if median < 100 else ",.0f"
    return f"{median:{digits}}" + (f" ({slowest:{digits}})" if len(row["seconds"]) > 1 else "")
