"""The targets of many adapters, and whether they are met: pure functions of the result's rows."""

from collections.abc import Iterator

from benchmarks.speed.metrics import Rows, exactly, row_of, time_ratio
from benchmarks.speed.targets import Target
from benchmarks.speed.timing import Spread, ratios, spread

KINDS = ("dvora structured r=256", "dvora dense r=256")
SMALL = "dvora structured r=64"
DECODED = {"part": "decode", "workload": "linears-1024-2-blocks", "dtype": "float32"}
READ = {"part": "prefill", "workload": "minilm", "dtype": "float32"}
TOKEN = {"part": "decode", "workload": "smollm2", "dtype": "float32"}
SETTINGS = {"linear layers": (DECODED, 1024), "MiniLM": (READ, 1024), "SmolLM2, one token a row": (TOKEN, 64)}
"""Where 64 adapters are compared with one, with the adapters that the bank knows there."""
GIGABYTE, MEGABYTE = 1e9, 1e6


def all_targets(rows: Rows) -> list[Target]:
    """All metrics with a target; float32 unless noted."""
    return [
        *_one_or_many(rows),
        *_token(rows),
        *_training(rows),
        *_stream(rows),
        *_resident(rows),
        *_first_use(rows),
        *_kernels(rows),
    ]


def bank_ratio(rows: Rows, kind: str, distinct: int, known: int, to: str, **setting: object) -> Spread | None:
    """Time of a batch through the bank in another arm's; None if it was not measured."""
    return time_ratio(rows, bank_arm(kind, distinct, known), to, **setting)


def p95_ratio(rows: Rows, loop: str, asked: int, used: bool) -> Spread | None:
    """The latency's 95th percentile in that of requests for 16 adapters; None if one was not measured."""
    few = row_of(rows, part="stream", loop=loop, asked=16)
    many = row_of(rows, part="stream", loop=loop, asked=asked, used=used)
    return None if few is None or many is None else spread(ratios(many["p95"], few["p95"]))


def bank_arm(kind: str, distinct: int, known: int) -> str:
    """The name of an arm."""
    return f"bank, {kind}, {distinct} of {known:,}"


def _one_or_many(rows: Rows) -> Iterator[Target]:
    for kind in KINDS:
        for label, (setting, known) in SETTINGS.items():
            measured = bank_ratio(rows, kind, 64, known, bank_arm(kind, 1, known), **setting)
            yield Target(f"64 adapters to one, bank, {label}: {kind}", 1.1, measured)
    for kind in (SMALL, KINDS[0]):
        names = [f"adapter_names, {kind}, {distinct} of 64" for distinct in (64, 1)]
        for label in ("linear layers", "MiniLM"):
            measured = time_ratio(rows, names[0], names[1], **SETTINGS[label][0])
            yield Target(f"64 adapters to one, `adapter_names`, {label}: {kind}", 1.2, measured)


def _token(rows: Rows) -> Iterator[Target]:
    measured = bank_ratio(rows, KINDS[0], 64, 1024, "base", **DECODED)
    yield Target(f"one token a row, hidden 1,024, 64 adapters to the base: {KINDS[0]}", 1.35, measured)


def _training(rows: Rows) -> Iterator[Target]:
    measured = time_ratio(rows, *(bank_arm(KINDS[0], tenants, 64) for tenants in (64, 1)), part="training")
    yield Target(f"64 tenants to one, a training step of MiniLM: {KINDS[0]}", 1.3, measured)


def _stream(rows: Rows) -> Iterator[Target]:
    for loop in ("closed", "open"):
        for used, which in ((True, "all used before"), (False, "with first uses")):
            measured = p95_ratio(rows, loop, 1024, used)
            yield Target(f"95th percentile of the latency, 1,024 adapters to 16, {which}, {loop} loop", 1.1, measured)


def _resident(rows: Rows) -> Iterator[Target]:
    row = row_of(rows, part="resident", known=10_000, host_bytes=2**30)
    measured = None if row is None else exactly((row["after_bytes"] - row["before_bytes"]) / GIGABYTE)
    yield Target("10,000 adapters of MiniLM, all used, resident", 1.1, measured, unit="gigabytes")


def _first_use(rows: Rows) -> Iterator[Target]:
    for workload, source, limit in (
        ("minilm", "pack", 0.01),
        ("smollm2", "pack", 0.05),
        ("minilm", "folder", 0.05),
    ):
        for rank in (64, 256):
            row = row_of(rows, part="loading", workload=workload, way="bank", rank=rank, what=f"first use, {source}")
            measured = None if row is None else spread(row["seconds"])
            name = {"minilm": "MiniLM", "smollm2": "SmolLM2"}[workload]
            yield Target(f"first use from a {source}, {name}, r={rank}", limit, measured, unit="milliseconds")


def _kernels(rows: Rows) -> Iterator[Target]:
    for kind in KINDS:
        for label, (setting, known) in SETTINGS.items():
            one, many = (row_of(rows, arm=bank_arm(kind, distinct, known), **setting) for distinct in (1, 64))
            if one is not None and many is not None:
                more = exactly((many["kernels"] - one["kernels"]) / many["layers"] / many["passes"])
                yield Target(f"kernels a layer that 64 adapters add to one, {label}: {kind}", 0, more, unit="count")
