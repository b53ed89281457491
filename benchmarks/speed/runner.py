"""Carries out the plan: rows of seconds, and what could not be measured, with the reason."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dvora
from benchmarks.speed.arms import Arm, adapted
from benchmarks.speed.plan import MERGED, Run
from benchmarks.speed.steps import CACHED_TOKENS, decode_step, prefill_step, training_step
from benchmarks.speed.timing import Step, interleaved
from benchmarks.speed.workloads import Workload

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Report:
    """Rows of the result file, and what is missing in them."""

    rows: list[Row] = field(default_factory=list)
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def miss(self, what: str, error: BaseException | str) -> None:
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.not_measured.append({"what": what, "reason": reason})


def carry_out(run: Run, report: Report, on_round: Step = lambda: None) -> None:
    """Time one run's methods in turns and add a row for each."""
    workload, dtype = run.workload(), DTYPES[run.dtype]
    base = workload.frozen(dtype)
    extra = CACHED_TOKENS if run.part == "decode" else 0
    x = workload.inputs(run.batch, run.tokens + extra, dtype)
    with ExitStack() as contexts:
        steps: dict[str, Step] = {}
        arms = {arm.name: arm for arm in run.arms}
        for name, arm in arms.items():
            try:
                steps[name] = _step(run, workload, base, arm, x, contexts)
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                report.miss(f"{workload.name}, {run.dtype}: {name}", error)
        seconds, repeats = interleaved(steps, run.rounds, on_round=on_round)
    setting = {"part": run.part, "workload": workload.name, "dtype": run.dtype, "batch": run.batch}
    for name, measured in seconds.items():
        method, rank = arms[name]
        row = {**setting, "tokens": run.tokens, "arm": name, "method": method, "rank": rank, "repeats": repeats}
        report.rows.append({**row, "seconds": [float(f"{value:.5g}") for value in measured]})


def _step(run: Run, workload: Workload, base: nn.Module, arm: Arm, x: Tensor, contexts: ExitStack) -> Step:
    if arm == MERGED:
        model = adapted(base, Arm("dvora dense", arm.rank), workload.targets)
        contexts.enter_context(dvora.merged(model))
    else:
        model = adapted(base, arm, workload.targets)
    if run.part == "decode":
        return decode_step(model, x)
    make: Callable[[Workload, nn.Module, Tensor], Step] = prefill_step if run.part == "prefill" else training_step
    step = make(workload, model, x)
    return step
