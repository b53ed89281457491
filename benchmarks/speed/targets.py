"""The targets, and whether they are met: pure functions of the result's rows."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.speed.metrics import Rows, time_ratio
from benchmarks.speed.timing import Spread
from benchmarks.tables import table

UNITS = {"": (1, ".3g", ""), "ms": (1e3, ".3g", " ms"), "GB": (1e-9, ".2f", " GB")}
"""By what stands behind a number: the factor from the row's unit, and the format."""


class Target(NamedTuple):
    """One metric and its target.

    Args:
        metric: its name.
        limit: at most so much, or at least.
        measured: median and quartiles, or None if it was not measured.
        at_least: whether the limit is a lower bound instead of an upper one.
        unit: of `UNITS`; limit and measured are in seconds or bytes there.
    """

    metric: str
    limit: float
    measured: Spread | None
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median is within the limit; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit

    def cells(self) -> tuple[str, str, str, str]:
        """For a table: name, limit, median with quartiles, and whether it is met."""
        limit = f"{'≥' if self.at_least else '≤'} {self._shown(self.limit)}"
        if self.measured is None:
            return self.metric, limit, "not measured", ""
        low, median, high = map(self._shown, self.measured)
        return self.metric, limit, median if low == high else f"{median} ({low} to {high})", "yes" if self.met else "no"

    def _shown(self, value: float) -> str:
        factor, form, ending = UNITS[self.unit]
        return f"{value * factor:{form}}{ending}"


def targets_table(targets: Iterable[Target]) -> list[str]:
    """The lines of a table of targets."""
    return table(("measure", "target", "median (quartiles)", "met"), (target.cells() for target in targets))


def all_targets(rows: Rows) -> Iterator[Target]:
    """All metrics with a target. Training is of the linear layers alone unless noted, decoding of a Llama block."""
    linears = {"part": "training", "workload": "linears-1024", "dtype": "float32"}
    for tokens, arm, to, limit in (
        (512, "dvora dense r=256", "VeRA r=256", 1.0),
        (4096, "dvora dense r=256", "VeRA r=256", 0.97),
        (512, "dvora dense r=1024", "VeRA r=1024", 1.2),
        (512, "dvora structured r=256", "VeRA r=256", 0.85),
        (512, "dvora structured r=1024", "VeRA r=1024", 0.55),
        (512, "dvora structured r=1024", "LoRA r=16", 1.25),
        (512, "dvora structured r=1024", "DoRA r=16", 0.75),
    ):
        measured = time_ratio(rows, arm, to, tokens=tokens, **linears)
        yield Target(f"training, {tokens:,} tokens: {arm} to {to}", limit, measured)
    for name, workload, batch, arm, to, limit in (
        ("MiniLM, 16 x 32 tokens", "minilm", 16, "dvora structured r=256", "LoRA r=16", 1.2),
        ("MiniLM, 16 x 32 tokens", "minilm", 16, "dvora structured r=64", "LoRA r=1", 1.2),
        ("MiniLM, 64 x 32 tokens", "minilm", 64, "dvora structured r=64", "LoRA r=1", 1.08),
        ("SmolLM2, 128 tokens", "smollm2", 1, "dvora structured r=256", "LoRA r=16", 1.2),
    ):
        measured = time_ratio(rows, arm, to, part="training", workload=workload, dtype="float32", batch=batch)
        yield Target(f"training, {name}: {arm} to {to}", limit, measured)
    decode = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
    for kind, limit in (("dense", 0.95), ("structured", 0.8)):
        arm = f"dvora {kind} r=256"
        yield Target(f"one token: {arm} to VeRA r=256", limit, time_ratio(rows, arm, "VeRA r=256", batch=1, **decode))
        yield Target(f"one token: DoRA r=16 to {arm}", 8, time_ratio(rows, "DoRA r=16", arm, batch=1, **decode), True)
        yield Target(f"16 rows of a token: {arm} to the base", 1.25, time_ratio(rows, arm, "base", batch=16, **decode))
