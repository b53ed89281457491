"""The command: `python -m benchmarks.many_adapters` measures everything; `--help` says how to measure less."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

import dvora
from benchmarks.many_adapters import batches, loading, one_text, plan, resident, training
from benchmarks.many_adapters.arms import packed
from benchmarks.many_adapters.results import check_environment, merge
from benchmarks.results import file_of
from benchmarks.speed.__main__ import quieten, show
from benchmarks.speed.arms import adapted
from benchmarks.speed.runner import Report


def _resident(chosen: plan.Plan, folder: Path, report: Report) -> None:
    workload = chosen.encoder
    base = workload.frozen(torch.float32).eval()
    pack = packed(adapted(base, chosen.adapter, workload.targets), chosen.known, folder)
    for slots, host_bytes in chosen.resident:
        given = workload, pack, chosen.known, slots, host_bytes
        report.attempt(f"resident size, {slots} slots", partial(resident.measure, report, *given))


def _loading(chosen: plan.Plan, folder: Path, report: Report) -> None:
    for workload, arms, count in chosen.loaded:
        (own := folder / workload.name).mkdir()
        loading.measure(report, workload, arms, own, count)


def _batches(chosen: plan.Plan, _: Path, report: Report) -> None:
    for ground in chosen.grounds:
        batches.measure(report, ground)


def _training(chosen: plan.Plan, folder: Path, report: Report) -> None:
    training.measure(report, chosen.encoder, chosen.adapter, folder, rounds=3)


def _one_text(chosen: plan.Plan, folder: Path, report: Report) -> None:
    for asked in chosen.one_text:
        (own := folder / asked.encoder).mkdir()
        one_text.measure(report, asked, own)


SECTIONS: dict[str, Callable[[plan.Plan, Path, Report], None]] = {
    "batches": _batches,
    "training": _training,
    "resident": _resident,
    "loading": _loading,
    "one text": _one_text,
}
"""Batches with one adapter and with many; steps that train one and as many as rows; memory; first uses; one text."""


def main(arguments: list[str] | None = None) -> int:
    """Measure what many adapters cost; each section's rows replace its earlier ones in the result file."""
    chosen = _parser().parse_args(arguments)
    quieten()
    # That a merge in bfloat16 rounds is not what is measured.
    warnings.filterwarnings("ignore", category=dvora.MergePrecisionWarning)
    torch.set_num_threads(chosen.threads)
    names: list[str] = chosen.part or list(SECTIONS)
    file: Path | None = chosen.output or (None if chosen.quick else file_of("many_adapters"))
    if file:
        check_environment(file, names)
    console, everything = Console(stderr=True), Report()
    with tempfile.TemporaryDirectory(prefix="dvora-many-adapters-") as folder:
        for name in names:
            report, start = Report(), perf_counter()
            with console.status(name):
                (own := Path(folder) / name).mkdir()
                SECTIONS[name](plan.quick() if chosen.quick else plan.whole(), own, report)
            if file:
                merge(file, name, report, perf_counter() - start)
            console.print(f"{name}: {perf_counter() - start:.0f} s")
            everything.rows += report.rows
            everything.not_measured += report.not_measured
    show(everything)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_adapters", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: whether everything runs; writes no file")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--part", nargs="+", choices=SECTIONS, help="left out: all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
