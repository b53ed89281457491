"""The command: `python -m benchmarks.many_adapters` measures everything; `--help` says how to measure less."""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

import dvora
from benchmarks.many_adapters import batches, loading, plan, resident, storage, stream, training
from benchmarks.many_adapters.population import Population, packed
from benchmarks.many_adapters.results import RESULT, check_environment, merge
from benchmarks.many_adapters.targets import all_targets
from benchmarks.speed.__main__ import quieten
from benchmarks.speed.arms import Arm
from benchmarks.speed.results import show
from benchmarks.speed.runner import Report
from benchmarks.speed.workloads import Workload


class Measured:
    """What is measured, section by section; packs are written once.

    Args:
        chosen: the plan.
        folder: for adapters.
    """

    def __init__(self, chosen: plan.Plan, folder: Path) -> None:
        self.plan, self.folder = chosen, folder

    @cached_property
    def population(self) -> Population:
        """Adapters of the encoder."""
        return self._populations(self.plan.encoder, [self.plan.adapter])[0]

    @cached_property
    def pack(self) -> Path:
        """Adapters of the encoder."""
        return packed(self.population, max(self.plan.asked), self._new_folder("pack"))

    def batches(self, report: Report) -> Iterator[str]:
        """Batches with one adapter and with many."""
        for ground in self.plan.grounds:
            yield f"batches: {ground.workload.name}, {ground.dtype}"
            batches.measure(report, ground)

    def storage(self, report: Report) -> Iterator[str]:
        """Bytes of an adapter, where it can be."""
        for workload, arms, _ in self.plan.loaded:
            yield f"storage: {workload.name}"
            storage.measure(
                report, workload, self._populations(workload, arms), self._new_folder(f"storage-{workload.name}")
            )

    def loading(self, report: Report) -> Iterator[str]:
        """First uses, and adapters that have left their slots."""
        for workload, arms, count in self.plan.loaded:
            yield f"loading: {workload.name}"
            folder = self._new_folder(f"loading-{workload.name}")
            loading.measure(report, workload, self._populations(workload, arms), folder, count)

    def stream(self, report: Report) -> Iterator[str]:
        """Requests for more adapters than slots."""
        yield f"packing {max(self.plan.asked):,} adapters"
        settings = self.plan.asked, self.pack, self.plan.requests, self.plan.rounds
        yield "stream of requests"
        stream.measure(report, self.plan.encoder, self.population.base, *settings)

    def resident(self, report: Report) -> Iterator[str]:
        """Memory of processes with thousands of adapters."""
        most = max(self.plan.asked)
        yield f"packing {most:,} adapters"
        pack = self.pack
        for slots, host_bytes in self.plan.resident:
            yield f"resident: {slots} slots, {host_bytes / 1e6:,.0f} MB on the host"
            measure = partial(resident.measure, report, self.plan.encoder, pack, most, slots, host_bytes)
            report.attempt(f"resident size, {slots} slots", measure)

    def training(self, report: Report) -> Iterator[str]:
        """Steps that train one adapter, and as many as rows."""
        yield "training"
        training.measure(report, self.plan.encoder, self.population, self._new_folder("training"), rounds=3)

    @staticmethod
    def _populations(workload: Workload, arms: Sequence[Arm]) -> list[Population]:
        """One of each arm, over one base."""
        base = workload.frozen(torch.float32).eval()
        return [Population(base, arm, workload.targets) for arm in arms]

    def _new_folder(self, name: str) -> Path:
        found = self.folder / name
        found.mkdir()
        return found


SECTIONS: dict[str, Callable[[Measured, Report], Iterator[str]]] = {
    "batches": Measured.batches,
    "training": Measured.training,
    "stream": Measured.stream,
    "resident": Measured.resident,
    "loading": Measured.loading,
    "storage": Measured.storage,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure what many adapters cost; each section's rows replace its earlier ones in the result file."""
    chosen = _parser().parse_args(arguments)
    quieten()
    # That a merge in bfloat16 rounds is not what is measured.
    warnings.filterwarnings("ignore", category=dvora.MergePrecisionWarning)
    torch.set_num_threads(chosen.threads)
    sections: list[str] = chosen.part or list(SECTIONS)
    file: Path | None = chosen.output or (None if chosen.quick else RESULT)
    if file:
        check_environment(file, sections)
    console, everything = Console(stderr=True), Report()
    with tempfile.TemporaryDirectory(prefix="dvora-many-adapters-") as folder:
        measured = Measured(plan.quick() if chosen.quick else plan.whole(), Path(folder))
        for section in sections:
            report, start = Report(), perf_counter()
            with console.status(section) as status:
                for what in SECTIONS[section](measured, report):
                    status.update(what)
            if file:
                merge(file, section, report, perf_counter() - start)
            console.print(f"{section}: {perf_counter() - start:.0f} s")
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
