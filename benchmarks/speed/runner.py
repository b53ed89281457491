"""The runner of everything that is timed: methods in turns, rows of seconds, and what could not be measured and why."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, process_time
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import dvora
from benchmarks.results import Row
from benchmarks.speed.arms import MERGED, Arm, adapted
from benchmarks.speed.plan import Run
from benchmarks.speed.steps import CACHED_TOKENS, decode_step, prefill_step, training_step
from benchmarks.speed.timing import Step, interleaved
from benchmarks.speed.workloads import Workload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAILURES = (AttributeError, ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
"""What a library answers with where a method does not work in a setting."""


Counts = Mapping[str, Callable[[Step], Any]]
"""What is found out of a step that ran once, by the names in the rows."""


class Named(Protocol):
    """A method, or a way to serve a batch."""

    @property
    def name(self) -> str:
        """As in the result file."""
        ...

    def described(self) -> dict[str, Any]:
        """For a row of the result file."""
        ...


@dataclass
class Report:
    """Rows of the result file, and what is missing in them."""

    rows: list[Row] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Add a row; five digits of a time are more than can be trusted."""
        self.rows.append({key: _rounded(value) if "seconds" in key else value for key, value in row.items()})

    def attempt(self, what: str, step: Step) -> bool:
        """Whether something works; if not, its error is noted."""
        try:
            step()
        except FAILURES as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self.not_measured.append({"what": what, "reason": reason})
            return False
        return True

    def time_in_turns(
        self,
        setting: Mapping[str, Any],
        makers: Mapping[Named, Callable[[], Step]],
        rounds: int,
        counts: Counts | None = None,
    ) -> None:
        """Make the step of each method, run it once, time all in turns, and add a row for each that works.

        Args:
            setting: what is the same in all rows; `part` and `workload` among it.
            makers: of the steps; the first is the reference.
            rounds: how often each is timed.
            counts: what else goes into the rows.
        """
        steps: dict[Named, Step] = {}
        counted: dict[Named, dict[str, Any]] = {}

        def prepare(arm: Named, make: Callable[[], Step]) -> None:
            step = make()
            # Also the warm-up: what is made at first use is there afterwards.
            step()
            counted[arm] = {name: count(step) for name, count in (counts or {}).items()}
            steps[arm] = step

        where = ", ".join(str(setting[key]) for key in ("part", "workload", "dtype") if key in setting)
        for arm, make in makers.items():
            self.attempt(f"{where}: {arm.name}", partial(prepare, arm, make))
        clock = process_time if torch.get_num_threads() == 1 else perf_counter
        seconds, repeats = interleaved({arm.name: step for arm, step in steps.items()}, rounds, clock=clock)
        for arm in steps:
            measured = {**counted[arm], "repeats": repeats, "seconds": seconds[arm.name]}
            self.add({**setting, **arm.described(), **measured})


def carry_out(run: Run, report: Report, device: str = "cpu", counts: Counts | None = None) -> None:
    """Time one run's methods in turns and add a row for each."""
    workload, dtype = run.workload(), DTYPES[run.dtype]
    base = workload.frozen(dtype).to(device)
    prompt = CACHED_TOKENS if run.part == "decode" else 0
    x = workload.inputs(run.batch, prompt + run.tokens, dtype).to(device)

    def make(arm: Arm) -> Step:
        model = adapted(base, arm, workload.targets)
        if arm.method == MERGED.method:
            contexts.enter_context(dvora.merged(model.eval()))
        step = STEPS[run.part](workload, model, x)
        return partial(_finished, step) if device.startswith("cuda") else step

    layers = sum(name.endswith(workload.targets) for name, _ in base.named_modules())
    setting = {"part": run.part, "workload": workload.name, "dtype": run.dtype, "batch": run.batch, "layers": layers}
    with ExitStack() as contexts:
        makers = {arm: partial(make, arm) for arm in run.arms}
        report.time_in_turns({**setting, "tokens": run.tokens}, makers, run.rounds, counts)


def _finished(step: Step) -> None:
    """A step of a GPU, which goes on after the call."""
    step()
    torch.cuda.synchronize()


def _decode(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    return decode_step(model, x)


STEPS: dict[str, Callable[[Workload, nn.Module, Tensor], Step]] = {
    "training": training_step,
    "prefill": prefill_step,
    "decode": _decode,
}


def _rounded(seconds: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in seconds]
