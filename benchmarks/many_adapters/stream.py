"""Streams of requests for more adapters than there are slots: throughput, and how long requests wait.

An adapter's first use reads it and computes its factors. Where more are asked for than there are slots, one stream has
first uses among its requests, and one bank has used all of its adapters before.

All numbers of adapters are served in turns, some requests at a time, so that a busy machine slows all alike.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dvora
from benchmarks.many_adapters.plan import SLOTS
from benchmarks.many_adapters.population import name_of
from benchmarks.many_adapters.requests import (
    Answered,
    Serve,
    WallClock,
    closed_loop,
    open_loop,
    poisson,
    zipf,
)
from benchmarks.speed.arms import sharing_copy
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload

BATCH, TOKENS = 8, 16
"""Rows of a batch at most, and their tokens."""
CLIENTS = 2 * BATCH
"""In the closed loop: one batch is served while the next one waits."""
WAITING = 8 * BATCH
"""Requests that may wait in the open loop."""
LOAD = 0.7
"""Of the open loop, in the closed loop's throughput with the fewest adapters."""
EXPONENT = 1.0
SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Stream:
    """Requests for some number of adapters.

    Args:
        asked: for how many adapters requests ask; 0 is the base alone.
        used: whether the bank has used all of them before.
        serve: answers a batch.
        stats: of the bank.
    """

    asked: int
    used: bool
    serve: Serve
    stats: Callable[[], Mapping[str, Any]]
    answered: dict[str, list[Answered]] = field(default_factory=lambda: {"closed": [], "open": []})


def measure(
    report: Report, workload: Workload, base: nn.Module, asked: Sequence[int], pack: Path, requests: int, rounds: int
) -> None:
    """Add a row for each loop and number of adapters."""
    with ExitStack() as banks:
        kinds = [(count, used) for count in asked for used in ((False, True) if count > SLOTS else (False,))]
        streams = [_of_base(workload, base), *(_of_bank(workload, base, *kind, pack, banks) for kind in kinds)]
        with torch.inference_mode():
            per_second = _serve(streams, requests, rounds)
        for stream in sorted(streams, key=lambda stream: (stream.asked, stream.used)):
            for loop, answered in stream.answered.items():
                offered = {"offered_per_second": _rounded(per_second)} if loop == "open" else {}
                row = _setting(workload, stream, loop, requests) | offered | summary(answered)
                report.rows.append({**row, "bank": stream.stats()})


def _serve(streams: list[Stream], requests: int, rounds: int) -> float:
    """All rounds of all streams; returns the requests a second of the open loop."""
    # Fills slots, and tells how many requests can be answered.
    warm = [_closed(stream, requests, seed=0) for stream in streams]
    per_second = LOAD * requests / warm[1].seconds
    for number in range(1, rounds + 1):
        for stream in streams:
            stream.answered["closed"].append(_closed(stream, requests, number))
        for stream in streams:
            stream.answered["open"].append(_open(stream, requests, number, per_second))
        # Back and forth, so that no stream always follows the same one.
        streams.reverse()
    return per_second


def summary(rounds: Sequence[Answered]) -> dict[str, Any]:
    """Percentiles and throughput of each round, and percentiles of all rounds together."""
    together = [latency for answered in rounds for latency in answered.latencies]
    return {
        **{name: [_rounded(np.quantile(each.latencies, share)) for each in rounds] for name, share in SHARES.items()},
        "per_second": [_rounded(len(each.latencies) / each.seconds) for each in rounds],
        "together": {name: _rounded(np.quantile(together, share)) for name, share in SHARES.items()},
        "refused": sum(each.refused for each in rounds),
    }


def _setting(workload: Workload, stream: Stream, loop: str, requests: int) -> dict[str, Any]:
    setting = {"part": "stream", "workload": workload.name, "dtype": "float32", "loop": loop, "asked": stream.asked}
    setting |= {"used": stream.used, "slots": SLOTS, "batch": BATCH, "tokens": TOKENS}
    setting |= {"exponent": EXPONENT, "requests": requests}
    return setting | ({"clients": CLIENTS} if loop == "closed" else {"waiting": WAITING})


def _closed(stream: Stream, requests: int, seed: int) -> Answered:
    return closed_loop(_asked(stream, requests, seed), CLIENTS, BATCH, stream.serve, WallClock())


def _open(stream: Stream, requests: int, seed: int, per_second: float) -> Answered:
    moments = poisson(requests, per_second, seed)
    return open_loop(_asked(stream, requests, seed), moments, WAITING, BATCH, stream.serve, WallClock())


def _asked(stream: Stream, requests: int, seed: int) -> list[int]:
    return zipf(max(stream.asked, 1), requests, EXPONENT, seed)


def _of_base(workload: Workload, base: nn.Module) -> Stream:
    x = workload.inputs(BATCH, TOKENS, torch.float32)
    return Stream(0, False, lambda rows: workload.output(base, x[: len(rows)]), dict)


def _of_bank(workload: Workload, base: nn.Module, asked: int, used: bool, pack: Path, banks: ExitStack) -> Stream:
    x, model = workload.inputs(BATCH, TOKENS, torch.float32), sharing_copy(base)
    bank = dvora.AdapterBank(model, slots=SLOTS, dtype=torch.float16)
    banks.callback(bank.close)
    bank.add_pack(pack)
    for first in range(0, asked if used else 0, SLOTS):
        with bank.rows([name_of(number) for number in range(first, min(first + SLOTS, asked))]):
            pass

    def serve(rows: Sequence[int]) -> None:
        with bank.rows([name_of(number) for number in rows]):
            workload.output(model, x[: len(rows)])

    return Stream(asked, used, serve, lambda: bank.stats()._asdict())


def _rounded(value: Any) -> float:
    return float(f"{value:.5g}")
