"""On a GPU: bfloat16 layers of Llama-3-8B's sizes, 4,096 tokens, and single tokens with CUDA graphs. Not run so far.

Run from the repository's root: python -m benchmarks.speed.cuda --output FILE
For the kernels of "Scaling DoRA" (dorafactors), which come as a fork of PEFT, in a second run: the same command with
the Python of an environment where that fork is installed, and --dorafactors; its rows have a base of their own.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.arms import BASE, Arm, adapted
from benchmarks.speed.plan import at_rank
from benchmarks.speed.runner import Report
from benchmarks.speed.steps import training_step
from benchmarks.speed.timing import Step
from benchmarks.speed.workloads import Workload, linears, random, randomised

TOKENS = 4096
DTYPE = torch.bfloat16
DORA = [Arm("DoRA", 16), Arm("DoRA", 256)]
ARMS = [BASE, Arm("LoRA", 16), Arm("LoRA", 1), *at_rank(256), *at_rank(1024), *DORA]
ROUNDS, WARM_UPS, REPEATS = 20, 3, 10


def square() -> Workload:
    """One layer of 4,096 x 4,096."""

    def build() -> nn.Module:
        model = nn.Sequential()
        model.add_module("proj", nn.Linear(4096, 4096, bias=False))
        return randomised(model)

    return Workload("square-4096", 4096, ("proj",), build, lambda model, x: model(x))


def llama_3_8b() -> Workload:
    """The linear layers of a block of Llama-3-8B: key and value have 1,024 outputs, the feed-forward pair 14,336."""
    return linears(4096, 14336, key_value=1024)


def graphed(model: nn.Module, x: Tensor) -> Step:
    """One token through the layers, replayed from a CUDA graph: kernels alone, without their launches from Python."""
    model.eval()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(WARM_UPS):
            model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        model(x)
    return graph.replay


def interleaved(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Seconds of every step in every round, between events on the GPU's own clock."""
    order, seconds = list(steps), {name: list[float]() for name in steps}
    for round_number in range(WARM_UPS + ROUNDS):
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPEATS):
                steps[name]()
            end.record()
            end.synchronize()
            if round_number >= WARM_UPS:
                seconds[name].append(start.elapsed_time(end) / 1e3 / REPEATS)
        order.reverse()
    return seconds


def measure(report: Report, workload: Workload, arms: Mapping[str, Arm]) -> None:
    """A training step with 4,096 tokens, and single tokens for one row and sixteen."""
    base = workload.frozen(DTYPE).cuda()
    models: dict[str, nn.Module] = {}

    def make(name: str, arm: Arm) -> None:
        models[name] = adapted(base, arm, workload.targets).cuda()

    for name, arm in arms.items():
        report.attempt(f"{workload.name}: {name}", partial(make, name, arm))
    x = random(1, TOKENS, workload.hidden, dtype=DTYPE).cuda()
    for name, model in models.items():
        model.train()
        torch.cuda.reset_peak_memory_stats()
        training_step(workload, model, x)()
        row = {"part": "cuda memory", "workload": workload.name, "tokens": TOKENS, "arm": name}
        report.rows.append({**row, "peak_bytes": torch.cuda.max_memory_allocated()})
    _add(report, "cuda training", workload, TOKENS, {n: training_step(workload, m, x) for n, m in models.items()})
    for batch in (1, 16):
        token = random(batch, 1, workload.hidden, dtype=DTYPE).cuda()
        steps: dict[str, Step] = {}
        for name, model in models.items():
            what = f"CUDA graph, batch {batch}, {workload.name}: {name}"
            report.attempt(what, partial(_capture, steps, name, model, token))
        _add(report, "cuda decode", workload, batch, steps)


def _capture(steps: dict[str, Step], name: str, model: nn.Module, token: Tensor) -> None:
    steps[name] = graphed(model, token)


def _add(report: Report, part: str, workload: Workload, tokens: int, steps: dict[str, Step]) -> None:
    for name, seconds in interleaved(steps).items():
        report.add({"part": part, "workload": workload.name, "tokens": tokens, "arm": name, "seconds": seconds})


def main(arguments: list[str] | None = None) -> int:
    """Measure on the GPU and write a result file; print the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.cuda", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dorafactors", action="store_true", help="the installed PEFT is that fork")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is available: torch.cuda.is_available() is false", file=sys.stderr)
        return 1
    report = Report()
    arms, dora = ([BASE, *DORA], "dorafactors") if chosen.dorafactors else (ARMS, "DoRA")
    for workload in (square(), llama_3_8b()):
        measure(report, workload, {arm.name.replace("DoRA", dora): arm for arm in arms})
    for row in report.rows:
        if "seconds" in row:
            print(
                f"{row['part']:14} {row['workload']:20} {row['tokens']:5} {row['arm']:26} "
                f"{statistics.median(row['seconds']) * 1e3:9.3f} ms"
            )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "not_measured": report.not_measured,
        "rows": report.rows,
    }
    chosen.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
