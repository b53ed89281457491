"""The command: `python -m benchmarks.speed` measures everything; `--help` says how to measure less."""

import argparse
import sys
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks.kernel_count import kernels
from benchmarks.results import file_of, write
from benchmarks.speed import plan
from benchmarks.speed.arms import BASE
from benchmarks.speed.memory import measure_kept, measure_resident
from benchmarks.speed.metrics import time_ratio
from benchmarks.speed.plan import Run
from benchmarks.speed.runner import Report, carry_out
from benchmarks.speed.timing import ratios, spread

LORA = "LoRA r=1"
COUNTS = {"kernels": lambda step: kernels(step).total()}


def main(arguments: list[str] | None = None) -> int:
    """Measure how fast adapted models are; only a whole run on the CPU writes the committed result file."""
    chosen = _parser().parse_args(arguments)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {chosen.device}: torch {torch.__version__} sees no GPU; leave the option out")
    part_of_plan = chosen.overhead or chosen.groups
    plans = plan.OVERHEAD if chosen.overhead else plan.GROUPS if chosen.groups else plan.WHOLE
    plans = plan.QUICK if chosen.quick else plans
    runs = selected(plans, chosen)
    narrowed = chosen.part or chosen.workload or chosen.arm or chosen.rounds or chosen.device != "cpu"
    if not runs:
        raise SystemExit("no run of the plan is as described; see benchmarks/speed/plan.py")
    quieten()
    torch.set_num_threads(chosen.threads)
    report, start, console = Report(), perf_counter(), Console(stderr=True)
    for run in runs:
        with console.status(f"{run.part} {run.workload().name} {run.dtype} {run.batch} x {run.tokens}"):
            carry_out(run, report, chosen.device, COUNTS if chosen.overhead else None)
    if not (narrowed or part_of_plan):
        measure_kept(
            report,
            (plan.linears_64 if chosen.quick else plan.linears_1024)(),
            plan.TINY if chosen.quick else plan.COMPARED,
        )
        measure_resident(report, () if chosen.quick else plan.FEW)
    result = "overhead" if chosen.overhead else "groups_speed" if chosen.groups else "speed"
    file: Path | None = chosen.output or (None if chosen.quick or narrowed else file_of(result))
    if file:
        head = {"left_out": () if part_of_plan else plan.LEFT_OUT, "not_measured": report.not_measured}
        write(file, report.rows, seconds=round(perf_counter() - start), **head)
    show(report)
    return 0


def selected(runs: Iterable[Run], chosen: argparse.Namespace) -> list[Run]:
    """The runs of the command line; the base stays in each as the reference."""
    kept = [
        run
        for run in runs
        if run.part in (chosen.part or [run.part]) and run.workload().name in (chosen.workload or [run.workload().name])
    ]
    if chosen.arm:
        kept = [replace(run, arms=[a for a in run.arms if a == BASE or a.name in chosen.arm]) for run in kept]
    return [replace(run, rounds=chosen.rounds) for run in kept] if chosen.rounds else kept


def show(report: Report) -> None:
    """Ratios to the base and to LoRA r=1, kernels a layer beyond the base's, and what is missing."""
    console, keys = Console(), ("part", "workload", "dtype", "batch", "tokens")
    timed = [row for row in report.rows if all(key in row for key in ("batch", "seconds"))]
    for setting in dict.fromkeys(tuple(row[key] for key in keys) for row in timed):
        rows = [row for row in timed if tuple(row[key] for key in keys) == setting]
        lora = any(row["arm"] == LORA for row in rows)
        counts = ["kernels"] if lora and rows[0].get("kernels") else []
        heads = ["", "ms", "to base", "quartiles", *([f"to {LORA}"] if lora else []), *counts]
        shown = Table(*heads, title=" ".join(map(str, setting)))
        for row in rows:
            low, median, high = spread(ratios(row["seconds"], rows[0]["seconds"]))
            milliseconds = spread(row["seconds"]).median * 1e3
            cells = [row["arm"], f"{milliseconds:.2f}", f"{median:.3f}", f"{low:.3f} - {high:.3f}"]
            if lora_ratio := time_ratio(rows, row["arm"], LORA):
                cells.append(f"{lora_ratio.median:.3f}")
            cells += [f"{(row[count] - rows[0][count]) / row['layers']:.1f}" for count in counts if row[count]]
            shown.add_row(*cells)
        console.print(shown)
    for miss in report.not_measured:
        console.print(f"not measured: {miss['what']}: {miss['reason']}", markup=False)


def quieten() -> None:
    """Hide what would tear the line that says what is measured."""
    # transformers deprecates a property that PEFT still asks for, and its own name for a cache.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: whether everything runs")
    parser.add_argument("--overhead", action="store_true", help="kernels and host time a layer: with --threads 1")
    parser.add_argument("--groups", action="store_true", help="lambda_d by groups: with --threads 1")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--device", default="cpu", help="cuda: never tried")
    parser.add_argument("--output", type=Path, help="result file; left out, only a whole run writes one")
    parser.add_argument("--part", nargs="+", help="training, prefill, decode")
    parser.add_argument("--workload", nargs="+", help="linears-1024, llama-1024, minilm ...")
    parser.add_argument("--arm", nargs="+", help='"VeRA r=256" "dvora dense r=256" ...; the base is always there')
    parser.add_argument("--rounds", type=int, help="in place of the plan's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
