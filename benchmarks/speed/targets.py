"""The targets, and whether they are met: pure functions of the result's rows."""

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.speed.metrics import (
    Row,
    Rows,
    exactly,
    host_ratio,
    kernels_a_layer,
    row_of,
    share,
    time_ratio,
    worst,
)
from benchmarks.speed.timing import Spread

KINDS = ("dense", "structured")
RANKS = (256, 1024)
NORM_TOKENS = (512, 1024)
"""Tokens of the steps that the norm's time is compared with."""


class Target(NamedTuple):
    """One metric and its target.

    Args:
        metric: its name.
        limit: the target value.
        measured: median and quartiles, or None if it was not measured.
        at_least: whether the limit is a lower bound instead of an upper one.
        unit: as `tables.written` knows them.
    """

    metric: str
    limit: float
    measured: Spread | None
    at_least: bool = False
    unit: str = "times"

    @property
    def met(self) -> bool | None:
        """Whether the median is within the limit; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured.median >= self.limit if self.at_least else self.measured.median <= self.limit


def all_targets(rows: Rows) -> list[Target]:
    """All metrics with a target. Training is of the linear layers alone unless noted, decoding of a Llama block."""
    return [
        *_training(rows),
        *_whole_models(rows),
        *_overhead(rows),
        *_decoding(rows),
        *_memory(rows),
        *_norm(rows),
        *_set_up(rows),
    ]


def _training(rows: Rows) -> Iterator[Target]:
    pairs = [
        (512, "dvora dense r=256", "VeRA r=256", 1.0),
        (4096, "dvora dense r=256", "VeRA r=256", 0.97),
        (512, "dvora dense r=1024", "VeRA r=1024", 1.2),
        (512, "dvora structured r=256", "VeRA r=256", 0.85),
        (512, "dvora structured r=1024", "VeRA r=1024", 0.55),
        (512, "dvora structured r=1024", "LoRA r=16", 1.25),
        (512, "dvora structured r=1024", "DoRA r=16", 0.75),
    ]
    for tokens, arm, to, limit in pairs:
        setting = {"part": "training", "workload": "linears-1024", "dtype": "float32", "tokens": tokens}
        yield Target(f"training, {tokens:,} tokens: {arm} to {to}", limit, time_ratio(rows, arm, to, **setting))


def _whole_models(rows: Rows) -> Iterator[Target]:
    arm, to = "dvora structured r=256", "LoRA r=16"
    for name, workload, size, batch in (("MiniLM", "minilm", "16 x 32", 16), ("SmolLM2", "smollm2", "128", 1)):
        setting = {"part": "training", "workload": workload, "dtype": "float32", "batch": batch}
        yield Target(f"training, {name}, {size} tokens: {arm} to {to}", 1.2, time_ratio(rows, arm, to, **setting))


def _overhead(rows: Rows) -> Iterator[Target]:
    counted = {"part": "kernels", "device": "cpu", "dtype": "float32", "workload": "llama-1024-8-blocks"}
    limits = {"training, few tokens": (20, 32), "one token": (5, 7)}
    for route, of_kinds in limits.items():
        for kind, limit in zip(KINDS, of_kinds, strict=True):
            arm = f"dvora {kind} r=256"
            measured = kernels_a_layer(row_of(rows, arm=arm, route=route, **counted))
            yield Target(f"kernels a layer, {route}: {arm}", limit, measured, unit="count")
    for kind in KINDS:
        arm, to = f"dvora {kind} r=16", "VeRA r=16"
        measured = host_ratio(rows, arm, to, route="training, few tokens", dtype="float32")
        yield Target(f"host time beyond the base's, training, few tokens: {arm} to {to}", 2.5, measured)


def _decoding(rows: Rows) -> Iterator[Target]:
    setting = {"part": "decode", "workload": "llama-1024", "dtype": "float32"}
    arms = [(f"dvora {kind} r={rank}", rank) for rank in RANKS for kind in KINDS]
    for (arm, rank), limit in zip(arms, (0.95, 0.8, 0.85, 0.85), strict=True):
        measured = time_ratio(rows, arm, f"VeRA r={rank}", batch=1, **setting)
        yield Target(f"decode, batch 1: {arm} to VeRA r={rank}", limit, measured)
    for arm, _ in arms:
        measured = time_ratio(rows, "DoRA r=16", arm, batch=1, **setting)
        yield Target(f"decode, batch 1: DoRA r=16 to {arm}", 8, measured, at_least=True)
    for arm, _ in arms:
        yield Target(f"decode, batch 16: {arm} to the base", 1.25, time_ratio(rows, arm, "base", batch=16, **setting))


def _memory(rows: Rows) -> Iterator[Target]:
    layers = [row for row in rows if row["part"] == "layer memory" and row["method"].startswith("dvora")]
    for kind in KINDS:
        of_kind = [row for row in layers if row["method"] == f"dvora {kind}"]
        kept = worst([exactly(beside_z(row)) for row in of_kind])
        inputs = exactly(sum(row["keeps_input"] for row in of_kind)) if of_kind else None
        yield Target(f"kept for backward beside z, in tokens x out, worst layer: dvora {kind}", 1.1, kept)
        yield Target(f"layers that keep their input, of {len(of_kind)}: dvora {kind}", 0, inputs)
    for rank in RANKS:
        for kind in KINDS:
            row = row_of(rows, part="memory", workload="linears-1024", dtype="float32", arm=f"dvora {kind} r={rank}")
            measured = None if row is None else exactly(row["constant_bytes"] / row["weight_bytes"])
            yield Target(f"constants to adapted weights, bytes: dvora {kind} r={rank}", 0.25, measured, unit="share")


def beside_z(row: Row) -> float:
    """What a layer keeps for the backward pass besides z, in units of tokens x out.

    The larger of what autograd's hooks see and of what is alive after the forward pass, without the output.
    """
    kept = max(row["saved_values"], row["held_values"]) - row["z_values"]
    return float(kept / (row["tokens"] * row["out_features"]))


def _norm(rows: Rows) -> Iterator[Target]:
    few, many = NORM_TOKENS
    shares = [(many, kind, rank, limit) for kind, limit in zip(KINDS, (0.05, 0.03), strict=True) for rank in RANKS]
    for tokens, kind, rank, limit in [(few, "structured", 1024, 0.06), *shares]:
        row = row_of(rows, part="norm", workload="linears-1024", tokens=tokens, arm=f"dvora {kind} r={rank}")
        metric = f"the norm's share of a step of {tokens:,} tokens: dvora {kind} r={rank}"
        yield Target(metric, limit, share(row, "seconds", "step_seconds"), unit="share")


def _set_up(rows: Rows) -> Iterator[Target]:
    for rank in RANKS:
        for kind in KINDS:
            layers = [row for row in rows if row["part"] == "set-up" and row["arm"] == f"dvora {kind} r={rank}"]
            measured = worst([share(row, "seconds", "forward_seconds") for row in layers])
            metric = f"set-up of a layer to 2 x out tokens through it, worst layer: dvora {kind} r={rank}"
            yield Target(metric, 1.0, measured)
    for kind in KINDS:
        row = row_of(rows, part="adapting", workload="smollm2", arm=f"dvora {kind} r=256")
        measured = None if row is None else share({**row, "one": [1.0] * len(row["seconds"])}, "seconds", "one")
        yield Target(f"adapting a model of 135 million parameters: dvora {kind} r=256", 5, measured, unit="seconds")
