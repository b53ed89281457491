"""Times and kernels of one batch, whose rows have one adapter or as many as there are rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import machine
from benchmarks.kernel_count import kernels
from benchmarks.many_adapters.arms import ManyArm, Models
from benchmarks.many_adapters.plan import Ground, Phase
from benchmarks.speed.runner import DTYPES, Report
from benchmarks.speed.steps import filled_cache, token_step
from benchmarks.speed.timing import Step

Pass = Callable[[Callable[..., Any]], object]
"""One pass of a model whose adapters are chosen."""


def measure(report: Report, ground: Ground) -> None:
    """Add a row for each arm and each kind of step of one model."""
    workload = ground.workload
    with Models(workload, DTYPES[ground.dtype], ground.rows) as models, torch.no_grad():
        layers = sum(name.endswith(workload.targets) for name, _ in models.base.named_modules())
        for phase in ground.phases:
            x = workload.inputs(ground.rows, phase.cached + phase.tokens, models.dtype)
            one_pass = _pass_of(models, phase, x)
            setting = {"part": phase.part, "workload": workload.name, "dtype": ground.dtype, "batch": ground.rows}
            setting |= {
                "machine": machine(),
                "tokens": phase.tokens,
                "passes": phase.passes,
                "cached": phase.cached,
                "layers": layers,
            }
            makers = {arm: partial(_step, models, arm, one_pass, phase.passes) for arm in ground.arms}
            report.time_in_turns(setting, makers, phase.rounds, {"kernels": lambda step: kernels(step).total()})


def _pass_of(models: Models, phase: Phase, x: Tensor) -> Pass:
    workload = models.workload
    if not phase.cached:
        return lambda model: workload.output(model, x)
    prompt, token = x.split([phase.cached, 1], dim=1)
    # All arms read the keys and values that the base has for the prompt.
    cache = filled_cache(models.base, prompt)
    return lambda model: token_step(model, token, cache)()


def _step(models: Models, arm: ManyArm, one_pass: Pass, passes: int) -> Step:
    """Choose the rows, then as many passes as are made before others are chosen."""
    chosen = models.chosen(arm)

    def step() -> None:
        with chosen() as model:
            for _ in range(passes):
                one_pass(model)

    return step
