"""Carries out the plan: rows of seconds, and what could not be measured, with the reason."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.arms import MERGED, Arm, adapted
from benchmarks.speed.plan import Run
from benchmarks.speed.steps import CACHED_TOKENS, decode_step, prefill_step, training_step
from benchmarks.speed.timing import Step, interleaved
from benchmarks.speed.workloads import Workload

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FAILURES = (AttributeError, ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError)
"""What a library answers with where a method does not work in a setting."""


@dataclass
class Report:
    """Rows of the result file, and what is missing in them."""

    rows: list[Row] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Add a row; five digits of a time are more than can be trusted."""
        self.rows.append({key: _rounded(value) if "seconds" in key else value for key, value in row.items()})

    def miss(self, what: str, reason: str) -> None:
        """Note what is missing."""
        self.not_measured.append({"what": what, "reason": reason})

    def attempt(self, what: str, step: Step) -> bool:
        """Whether something works; if not, its error is noted."""
        try:
            step()
        except FAILURES as error:
            self.miss(what, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return False
        return True


def carry_out(run: Run, report: Report, on_round: Step = lambda: None) -> None:
    """Time one run's methods in turns and add a row for each."""
    workload, dtype = run.workload(), DTYPES[run.dtype]
    base = workload.frozen(dtype)
    prompt = CACHED_TOKENS if run.part == "decode" else 0
    x = workload.inputs(run.batch, prompt + run.tokens, dtype)
    steps: dict[str, Step] = {}

    def prepare(arm: Arm) -> None:
        model = adapted(base, arm, workload.targets)
        if arm.method == MERGED.method:
            contexts.enter_context(merged(model.eval()))
        step = STEPS[run.part](workload, model, x)
        # Also the warm-up.
        step()
        steps[arm.name] = step

    with ExitStack() as contexts:
        for arm in run.arms:
            report.attempt(f"{run.part}, {workload.name}, {run.dtype}: {arm.name}", partial(prepare, arm))
        seconds, repeats = interleaved(steps, run.rounds, warm_ups=0, on_round=on_round)
    setting = {"part": run.part, "workload": workload.name, "dtype": run.dtype, "batch": run.batch}
    for arm in run.arms:
        if arm.name in seconds:
            measured = {"repeats": repeats, "seconds": seconds[arm.name]}
            report.add({**setting, "tokens": run.tokens, **arm.described(), **measured})


def merged(model: nn.Module) -> Any:
    """`dvora.merged`: the adapter lies in the weights as long as the context is open."""
    import dvora

    return dvora.merged(model)


def _decode(workload: Workload, model: nn.Module, x: Tensor) -> Step:
    return decode_step(model, x)


STEPS: dict[str, Callable[[Workload, nn.Module, Tensor], Step]] = {
    "training": training_step,
    "compile": training_step,
    "prefill": prefill_step,
    "decode": _decode,
}


def _rounded(seconds: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in seconds]
