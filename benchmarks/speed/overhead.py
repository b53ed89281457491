"""What a method adds to every layer whatever its size: kernels that it launches, and the time of the host to do so.

Kernels are counted in the second pass (the first makes what later ones find), on two devices. "cpu" is what runs here.
"meta" runs nothing and knows no values, but takes the branches that all devices but the CPU take.

Run from the repository's root: python -m benchmarks.speed.overhead
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.kernel_count import kernels
from benchmarks.speed.arms import BASE, Arm, adapted
from benchmarks.speed.metrics import Row, Rows, host_seconds, kernels_a_layer, row_of
from benchmarks.speed.plan import STRUCTURED_64, at_rank, linears_64, llama_64
from benchmarks.speed.results import write
from benchmarks.speed.runner import DTYPES, Report
from benchmarks.speed.steps import prefill_step, training_step
from benchmarks.speed.timing import Step, interleaved, spread
from benchmarks.speed.workloads import Workload, linears, llama

RESULT = Path(__file__).parent.parent / "results" / "overhead.json"
BLOCKS = 8
ROUNDS = 15


class Route(NamedTuple):
    """One way through a layer.

    Args:
        name: in the result file.
        tokens: in a step.
        step: makes it.
    """

    name: str
    tokens: int
    step: Callable[[Workload, nn.Module, Tensor], Step]


FEW, ONE = Route("training, few tokens", 8, training_step), Route("one token", 1, prefill_step)
ROUTES = (Route("training", 512, training_step), FEW, ONE, Route("prefill", 512, prefill_step))
ARMS = [BASE, Arm("LoRA", 16), Arm("LoRA", 1), Arm("DoRA", 16), STRUCTURED_64, *at_rank(256), *at_rank(1024)]
SMALL_ARMS = [BASE, Arm("LoRA", 16), Arm("LoRA", 1), Arm("DoRA", 16), *at_rank(16)]
"""For hidden size 64: no rank may exceed it, or structured matrices come in several blocks."""


def measure(report: Report, quick: bool, rounds: int = ROUNDS) -> None:
    """Kernels on both devices, and host times, in float32 and bfloat16."""
    for dtype in DTYPES:
        if quick:
            count(report, llama_64(), SMALL_ARMS[::3], dtype, "cpu")
            count(report, linears_64(), SMALL_ARMS[::3], dtype, "meta")
            time_host(report, llama_64(), SMALL_ARMS[::3], dtype, 2)
            continue
        count(report, llama(1024, 2816, heads=16, blocks=BLOCKS), ARMS, dtype, "cpu")
        # A Llama model asks for the values of its mask, which a tensor on the meta device does not have.
        count(report, linears(1024, 2816, blocks=BLOCKS), ARMS, dtype, "meta")
        time_host(report, llama(64, 176, heads=4, blocks=BLOCKS), SMALL_ARMS, dtype, rounds)


def count(report: Report, workload: Workload, arms: Sequence[Arm], dtype: str, device: str) -> None:
    """The kernels of a step of every method on every route, beside those of the frozen base.

    Args:
        report: gets the rows.
        workload: a model that fits in memory on the CPU, where it is made.
        arms: the base comes first.
        dtype: of the base.
        device: "cpu" or "meta".
    """
    base = workload.frozen(DTYPES[dtype])
    layers = len(_layers(base, workload))
    of_base: dict[str, int] = {}

    def add(arm: Arm, model: nn.Module, route: Route) -> None:
        step = route.step(workload, model, workload.inputs(1, route.tokens, DTYPES[dtype]).to(device))
        step()
        found = kernels(step).total()
        of_base.setdefault(route.name, found)
        setting = {"part": "kernels", "device": device, "workload": workload.name, "dtype": dtype, "batch": 1}
        row = {**setting, "tokens": route.tokens, "route": route.name, **arm.described(), "layers": layers}
        report.rows.append({**row, "kernels": found, "base_kernels": of_base[route.name]})

    with nullcontext() if device == "cpu" else _no_autocast_on(device):
        for arm in arms:
            model = adapted(base, arm, workload.targets)
            model = model if device == "cpu" else copy.deepcopy(model).to(device)
            for route in ROUTES:
                what = f"kernels, {workload.name}, {device}, {dtype}, {route.name}: {arm.name}"
                report.attempt(what, partial(add, arm, model, route))


def time_host(report: Report, workload: Workload, arms: Sequence[Arm], dtype: str, rounds: int) -> None:
    """Times of a step of a model so small that its kernels cost next to nothing, on one thread, in turns.

    Args:
        report: gets the rows.
        workload: the model.
        arms: the base comes first.
        dtype: of the base.
        rounds: how often every method is timed.
    """
    base = workload.frozen(DTYPES[dtype])
    layers = len(_layers(base, workload))
    models = {arm: adapted(base, arm, workload.targets) for arm in arms}
    for route in (FEW, ONE):
        x = workload.inputs(1, route.tokens, DTYPES[dtype])
        with _one_thread():
            steps = {arm.name: route.step(workload, model, x) for arm, model in models.items()}
            seconds, repeats = interleaved(steps, rounds, warm_ups=2)
        for arm in arms[1:]:
            row = {"part": "host time", "workload": workload.name, "dtype": dtype, "tokens": route.tokens}
            row |= {"route": route.name, **arm.described(), "layers": layers, "threads": 1, "repeats": repeats}
            report.add({**row, "seconds": seconds[arm.name], "base_seconds": seconds[BASE.name]})


def tables(rows: Rows) -> Iterator[Table]:
    """Kernels and microseconds a layer, one table for each device and dtype."""
    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in rows if row["part"] == "kernels"):
        chosen = {"part": "kernels", "device": device, "dtype": dtype}
        found = [row for row in rows if chosen.items() <= row.items()]
        yield _table(f"kernels a layer beyond the base's, {device}, {dtype}", found, _kernels)
    for dtype in dict.fromkeys(row["dtype"] for row in rows if row["part"] == "host time"):
        found = [row for row in rows if row["part"] == "host time" and row["dtype"] == dtype]
        yield _table(f"host time a layer beyond the base's, µs, {dtype}", found, _microseconds)


def _table(title: str, rows: Rows, cell: Callable[[Row], str]) -> Table:
    routes = list(dict.fromkeys(row["route"] for row in rows))
    table = Table("", *routes, title=title)
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != BASE.name):
        found = (row_of(rows, arm=arm, route=route) for route in routes)
        table.add_row(arm, *("" if row is None else cell(row) for row in found))
    return table


def _kernels(row: Row) -> str:
    found = kernels_a_layer(row)
    return "" if found is None else f"{found.median:.1f}"


def _microseconds(row: Row) -> str:
    return f"{spread(host_seconds(row)).median * 1e6:.0f}"


def _layers(base: nn.Module, workload: Workload) -> list[str]:
    return [name for name, _ in base.named_modules() if name.endswith(workload.targets)]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_autocast_on(device: str) -> Iterator[None]:
    """Asking PyTorch about autocast on a device that has none, or switching it off there, is an error otherwise."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def switched(device_type: str, *arguments: Any, **options: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == device else autocast(device_type, *arguments, **options)

    def enabled(device_type: str = "cuda") -> bool:
        return device_type != device and is_enabled(device_type)

    with mock.patch.multiple(torch, autocast=switched, is_autocast_enabled=enabled):
        yield


def main(arguments: list[str] | None = None) -> int:
    """Count kernels and time the host; show both a layer, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.overhead", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models and no result file unless one is named")
    parser.add_argument("--threads", type=int, default=2, help="of torch where kernels are counted")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the host's times")
    parser.add_argument("--output", type=Path, help="result file")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    report, start = Report(), perf_counter()
    measure(report, chosen.quick, chosen.rounds)
    for table in tables(report.rows):
        Console().print(table)
    for miss in report.not_measured:
        Console().print(f"not measured: {miss['what']}: {miss['reason']}", markup=False)
    file: Path | None = chosen.output or (None if chosen.quick else RESULT)
    if file:
        write(report, file, perf_counter() - start, ())
    return 0


if __name__ == "__main__":
    sys.exit(main())
