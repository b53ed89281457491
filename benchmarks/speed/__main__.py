"""The command: `python -m benchmarks.speed` measures everything; `--help` says how to measure less."""

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from benchmarks.speed import adapterhub, footprint, plan, set_up
from benchmarks.speed.arms import BASE
from benchmarks.speed.plan import Run
from benchmarks.speed.results import show, write
from benchmarks.speed.runner import Report, carry_out

RESULT = Path(__file__).parent.parent / "results" / "speed.json"


def memory(report: Report, quick: bool) -> None:
    """Memory of models, of single layers and of whole processes."""
    if quick:
        footprint.measure_model(report, plan.linears_64(), plan.TINY)
        return
    footprint.measure_model(report, plan.linears_1024(), plan.COMPARED)
    footprint.measure_layers(report, plan.COMPARED[2:])
    footprint.measure_resident(report, plan.FEW)


def setting_up(report: Report, quick: bool) -> None:
    """Constants of layers, a whole model, and the norm's share of a step."""
    if quick:
        set_up.measure_norm(report, 2, plan.linears_64(), plan.at_rank(16)[::2])
        return
    set_up.measure_layers(report, 7)
    set_up.measure_norm(report, 9)
    set_up.measure_model(report, 3)


def beside_adapterhub(report: Report, quick: bool) -> None:
    """AdapterHub's DVoRA; a quick run installs nothing."""
    if not quick:
        adapterhub.measure(report, 7)


SECTIONS: dict[str, Callable[[Report, bool], None]] = {
    "memory": memory,
    "set-up": setting_up,
    "adapterhub": beside_adapterhub,
}
"""Parts that are no timed run of the plan."""


def main(arguments: list[str] | None = None) -> int:
    """Measure how fast adapted models are; only a whole run writes the committed result file."""
    chosen = _parser().parse_args(arguments)
    quieten()
    torch.set_num_threads(chosen.threads)
    runs = selected(plan.quick() if chosen.quick else plan.whole(), chosen)
    sections = [name for name in SECTIONS if name in (chosen.part or SECTIONS) and not _narrowed(chosen)]
    if not runs and not sections:
        raise SystemExit("no run of the plan is as described; see benchmarks/speed/plan.py")
    report, start = Report(), perf_counter()
    whole = not (chosen.quick or chosen.part or _narrowed(chosen))
    file: Path | None = chosen.output or (RESULT if whole else None)
    try:
        measure(report, runs, sections, chosen.quick)
    except BaseException:
        if file:
            # What was measured until then, under another name: a result file is whole.
            write(report, file.with_suffix(".unfinished.json"), perf_counter() - start)
        raise
    if file:
        write(report, file, perf_counter() - start)
    show(report)
    return 0


def measure(report: Report, runs: list[Run], sections: list[str], quick: bool) -> None:
    """Carry out runs and sections, with a progress bar."""
    with _progress() as progress:
        bar = progress.add_task("", total=sum(run.rounds for run in runs) + 10 * len(sections))
        for run in runs:
            progress.update(bar, description=f"{run.part} {_name(run)} {run.dtype} {run.batch} x {run.tokens}")
            carry_out(run, report, on_round=lambda: progress.advance(bar))
        for name in sections:
            progress.update(bar, description=name)
            SECTIONS[name](report, quick)
            progress.advance(bar, 10)


def selected(runs: list[Run], chosen: argparse.Namespace) -> list[Run]:
    """The runs of the command line; the base stays in each as the reference."""
    kept = [
        run
        for run in runs
        if run.part in (chosen.part or [run.part])
        and _name(run) in (chosen.workload or [_name(run)])
        and run.tokens in (chosen.tokens or [run.tokens])
        and run.dtype in (chosen.dtype or [run.dtype])
        and run.batch in (chosen.batch or [run.batch])
    ]
    if chosen.arm:
        kept = [replace(run, arms=[a for a in run.arms if a == BASE or a.name in chosen.arm]) for run in kept]
    if chosen.rounds:
        kept = [replace(run, rounds=chosen.rounds) for run in kept]
    return kept


def _narrowed(chosen: argparse.Namespace) -> bool:
    return any((chosen.workload, chosen.tokens, chosen.dtype, chosen.batch, chosen.arm, chosen.rounds))


def _name(run: Run) -> str:
    return run.workload.__name__.replace("_", "-")


def quieten() -> None:
    """Hide what would tear the progress bar."""
    # transformers deprecates a property that PEFT still asks for, and its own name for a cache.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
    logging.disable_progress_bar()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: whether everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--output", type=Path, help="result file; left out, only a whole run writes one")
    parser.add_argument("--part", nargs="+", help="training, prefill, decode, memory, set-up, adapterhub")
    parser.add_argument("--workload", nargs="+", help="linears-1024, llama-1024, minilm ...")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16")
    parser.add_argument("--arm", nargs="+", help='"VeRA r=256" "dvora dense r=256" ...; the base is always there')
    parser.add_argument("--rounds", type=int, help="in place of the plan's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
