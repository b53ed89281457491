"""The targets of many adapters, and whether they are met: pure functions of the result's rows."""

from collections.abc import Iterator

from benchmarks.speed.metrics import Rows, exactly, row_of, time_ratio
from benchmarks.speed.targets import Target
from benchmarks.speed.timing import spread

KINDS = ("dvora structured r=256", "dvora dense r=256")
SMALL = "dvora structured r=64"
DECODED = {"part": "decode", "workload": "linears-1024-2-blocks", "dtype": "float32"}
READ = {"part": "prefill", "workload": "minilm", "dtype": "float32"}
TOKEN = {"part": "decode", "workload": "smollm2", "dtype": "float32"}
SETTINGS = {"linear layers": (DECODED, 1024), "MiniLM": (READ, 1024), "SmolLM2, one token a row": (TOKEN, 64)}
"""Where 64 adapters are compared with one, with the adapters that the bank knows there."""
MODELS = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}


def all_targets(rows: Rows) -> Iterator[Target]:
    """All metrics with a target; float32 unless noted."""
    for label, (setting, known) in SETTINGS.items():
        measured = time_ratio(rows, bank_arm(KINDS[0], 64, known), bank_arm(KINDS[0], 1, known), **setting)
        yield Target(f"64 adapters to one, {label}: {KINDS[0]}", 1.1, measured)
    for label, setting in (("linear layers", DECODED), ("MiniLM", READ)):
        names = [f"adapter_names, {KINDS[0]}, {distinct} of 64" for distinct in (64, 1)]
        yield Target(f"... through `adapter_names`, {label}: {KINDS[0]}", 1.2, time_ratio(rows, *names, **setting))
    measured = time_ratio(rows, bank_arm(KINDS[0], 64, 1024), "base", **DECODED)
    yield Target(f"64 adapters to the base, one token a row, hidden 1,024: {KINDS[0]}", 1.35, measured)
    measured = time_ratio(rows, *(bank_arm(KINDS[0], tenants, 64) for tenants in (64, 1)), part="training")
    yield Target(f"64 tenants to one, a training step of MiniLM: {KINDS[0]}", 1.3, measured)
    row = row_of(rows, part="resident", known=10_000, host_bytes=2**30)
    grown = None if row is None else exactly(row["after_bytes"] - row["before_bytes"])
    yield Target("10,000 adapters of MiniLM, all used, resident", 1.1e9, grown, unit="GB")
    for workload, limit in (("minilm", 0.01), ("smollm2", 0.05)):
        for rank in (64, 256):
            row = row_of(rows, part="loading", workload=workload, way="bank", rank=rank, what="first use, pack")
            measured = None if row is None else spread(row["seconds"])
            yield Target(f"first use from a pack, {MODELS[workload]}, r={rank}", limit, measured, unit="ms")


def bank_arm(kind: str, distinct: int, known: int) -> str:
    """The name of an arm."""
    return f"bank, {kind}, {distinct} of {known:,}"
