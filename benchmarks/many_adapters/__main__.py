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
from benchmarks.many_adapters import batches, loading, plan, resident, training
from benchmarks.many_adapters.arms import packed
from benchmarks.many_adapters.results import check_environment, merge
from benchmarks.many_adapters.targets import all_targets
from benchmarks.results import file_of
from benchmarks.speed.__main__ import quieten, show
from benchmarks.speed.arms import adapted
from benchmarks.speed.runner import Report


class Sections:
    """What is measured, section by section.

    Args:
        chosen: the plan.
        folder: for adapters.
    """

    def __init__(self, chosen: plan.Plan, folder: Path) -> None:
        self.plan, self.folder = chosen, folder

    def batches(self, report: Report) -> None:
        """Batches with one adapter and with many."""
        for ground in self.plan.grounds:
            batches.measure(report, ground)

    def training(self, report: Report) -> None:
        """Steps that train one adapter, and as many as rows."""
        training.measure(report, self.plan.encoder, self.plan.adapter, self._new_folder("training"), rounds=3)

    def resident(self, report: Report) -> None:
        """Memory of processes with thousands of adapters."""
        workload, folder = self.plan.encoder, self._new_folder("pack")
        base = workload.frozen(torch.float32).eval()
        pack = packed(adapted(base, self.plan.adapter, workload.targets), self.plan.known, folder)
        for slots, host_bytes in self.plan.resident:
            given = workload, pack, self.plan.known, slots, host_bytes
            report.attempt(f"resident size, {slots} slots", partial(resident.measure, report, *given))

    def loading(self, report: Report) -> None:
        """Sizes, first uses, and adapters that have left their slots."""
        for workload, arms, count in self.plan.loaded:
            loading.measure(report, workload, arms, self._new_folder(f"loading-{workload.name}"), count)

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir()
        return folder


SECTIONS: dict[str, Callable[[Sections, Report], None]] = {
    "batches": Sections.batches,
    "training": Sections.training,
    "resident": Sections.resident,
    "loading": Sections.loading,
}


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
        sections = Sections(plan.quick() if chosen.quick else plan.whole(), Path(folder))
        for name in names:
            report, start = Report(), perf_counter()
            with console.status(name):
                SECTIONS[name](sections, report)
            if file:
                merge(file, name, report, perf_counter() - start)
            console.print(f"{name}: {perf_counter() - start:.0f} s")
            everything.rows += report.rows
            everything.not_measured += report.not_measured
    show(everything, all_targets)
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
