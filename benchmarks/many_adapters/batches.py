"""Times and kernels of one batch, whose rows have one adapter or as many as there are rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_count import kernels
from benchmarks.many_adapters.arms import Chosen, ManyArm, Models
from benchmarks.many_adapters.plan import Ground, Phase
from benchmarks.speed.runner import DTYPES, Report
from benchmarks.speed.steps import filled_cache, token_step
from benchmarks.speed.timing import Step, interleaved

Pass = Callable[[Callable[..., Any]], object]
"""One pass of a model whose adapters are chosen."""


def measure(report: Report, ground: Ground, on_round: Step = lambda: None) -> None:
    """Add a row for each arm and each kind of step of one model."""
    with Models(ground.workload, DTYPES[ground.dtype], ground.rows) as models, torch.no_grad():
        for phase in ground.phases:
            _measure_phase(report, ground, phase, models, on_round)


def _measure_phase(report: Report, ground: Ground, phase: Phase, models: Models, on_round: Step) -> None:
    workload = ground.workload
    one_pass = _pass_of(models, phase, workload.inputs(ground.rows, phase.cached + phase.tokens, models.dtype))
    steps: dict[str, Step] = {}
    counts: dict[str, int] = {}

    def prepare(arm: ManyArm) -> None:
        step = _step(models.chosen(arm), one_pass, phase.passes)
        # Also the warm-up: what is made at first use is there afterwards.
        step()
        counts[arm.name] = kernels(step).total()
        steps[arm.name] = step

    for arm in ground.arms:
        report.attempt(f"{phase.part}, {workload.name}, {ground.dtype}: {arm.name}", partial(prepare, arm))
    seconds, repeats = interleaved(steps, phase.rounds, warm_ups=0, on_round=on_round)
    layers = sum(name.endswith(workload.targets) for name, _ in models.base.named_modules())
    setting = {"part": phase.part, "workload": workload.name, "dtype": ground.dtype, "batch": ground.rows}
    setting |= {"tokens": phase.tokens, "passes": phase.passes, "cached": phase.cached, "layers": layers}
    for arm in ground.arms:
        if arm.name in seconds:
            measured = {"kernels": counts[arm.name], "repeats": repeats, "seconds": seconds[arm.name]}
            report.add({**setting, **arm.described(), **measured})


def _pass_of(models: Models, phase: Phase, x: Tensor) -> Pass:
    workload = models.workload
    if not phase.cached:
        return lambda model: workload.output(model, x)
    prompt, token = x.split([phase.cached, 1], dim=1)
    # All arms read the keys and values that the base has for the prompt.
    cache = filled_cache(models.base, prompt)
    return lambda model: token_step(model, token, cache)()


def _step(chosen: Chosen, one_pass: Pass, passes: int) -> Step:
    """Choose the rows, then as many passes as are made before others are chosen."""

    def step() -> None:
        with chosen() as model:
            for _ in range(passes):
                one_pass(model)

    return step
