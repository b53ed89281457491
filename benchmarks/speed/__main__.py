"""The command: python -m benchmarks.speed [--quick] [--part training] [--workload llama-1024] [--arm "VeRA r=256"] ..."""

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.speed import plan
from benchmarks.speed.arms import BASE
from benchmarks.speed.plan import Run
from benchmarks.speed.runner import Report, carry_out
from benchmarks.speed.timing import ratios, spread

RESULT = Path(__file__).parent.parent / "results" / "speed.json"
WARM_UPS = 1


def main(arguments: list[str] | None = None) -> int:
    """Measure; the committed result file is written by a whole run only."""
    chosen = _parser().parse_args(arguments)
    # transformers deprecates a property that PEFT still asks for.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(chosen.threads)
    runs = selected(plan.quick() if chosen.quick else plan.whole(), chosen)
    report = Report()
    with _progress() as progress:
        bar = progress.add_task("", total=sum(run.rounds + WARM_UPS for run in runs))
        for run in runs:
            progress.update(bar, description=f"{run.part} {run.workload.__name__} {run.dtype} {run.batch}x{run.tokens}")
            carry_out(run, report, on_round=lambda: progress.advance(bar))
    show(report)
    narrowed = chosen.quick or chosen.part or chosen.workload or chosen.arm or chosen.tokens
    if file := chosen.output or (None if narrowed else RESULT):
        write(report, file)
    return 0


def selected(runs: list[Run], chosen: argparse.Namespace) -> list[Run]:
    """The runs of the command line; the base stays in each as the yardstick."""
    kept = [
        run
        for run in runs
        if run.part in (chosen.part or [run.part])
        and run.workload.__name__.replace("_", "-") in (chosen.workload or [run.workload.__name__.replace("_", "-")])
        and run.tokens in (chosen.tokens or [run.tokens])
        and run.dtype in (chosen.dtype or [run.dtype])
    ]
    if chosen.arm:
        kept = [replace(run, arms=[a for a in run.arms if a == BASE or a.name in chosen.arm]) for run in kept]
    if chosen.rounds:
        kept = [replace(run, rounds=chosen.rounds) for run in kept]
    if not kept:
        raise SystemExit("no run of the plan is as described; see benchmarks/speed/plan.py")
    return kept


def show(report: Report) -> None:
    """Medians and quartiles of the ratios to the base, as a table on the terminal."""
    console = Console()
    settings = dict.fromkeys(tuple(row[key] for key in SETTING) for row in report.rows)
    for setting in settings:
        rows = [row for row in report.rows if tuple(row[key] for key in SETTING) == setting]
        table = Table("", "ms", "to base", "quartiles", title=" ".join(map(str, setting)))
        for row in rows:
            low, median, high = spread(ratios(row["seconds"], rows[0]["seconds"]))
            milliseconds = spread(row["seconds"]).median * 1e3
            table.add_row(row["arm"], f"{milliseconds:.2f}", f"{median:.3f}", f"{low:.3f} - {high:.3f}")
        console.print(table)
    for miss in report.not_measured:
        console.print(f"not measured: {miss['what']}: {miss['reason']}", markup=False)


SETTING = ("part", "workload", "dtype", "batch", "tokens")


def write(report: Report, file: Path) -> None:
    """Write the result file whole or not at all."""
    result = {"environment": environment(), "rows": report.rows, "not_measured": report.not_measured}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: whether everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--part", nargs="+", help="training, prefill, decode ...")
    parser.add_argument("--workload", nargs="+", help="linears-1024, llama-1024 ...")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--dtype", nargs="+")
    parser.add_argument("--arm", nargs="+", help='"VeRA r=256" "dvora dense r=256" ...; the base is always there')
    parser.add_argument("--rounds", type=int, help="in place of the plan's")
    parser.add_argument("--output", type=Path, help="where to write; only whole runs write by themselves")
    return parser


if __name__ == "__main__":
    sys.exit(main())
