"""The steps of a run: the same batches, schedule and clipping for every method."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.quality.adapting import groups
from benchmarks.quality.grid import Grid, Run
from benchmarks.quality.labelled import Problem


def trained(grid: Grid, run: Run, task: Problem, reader: nn.Module) -> dict[str, Any]:
    """Train in place; the loss of the last steps, and the time of a step."""
    losses, times = [], []
    for loss, seconds in steps(grid, run, task, reader, PRECISIONS[grid.training["products"]]):
        losses.append(loss)
        times.append(seconds)
    if not math.isfinite(losses[-1]):
        return {"diverged": True}
    last = max(1, run.steps // 10)
    return {
        "diverged": False,
        "training_loss": float(np.mean(losses[-last:])),
        "seconds_per_step": float(np.median(times)),
    }


def precision() -> torch.autocast:
    """Matrix products in bfloat16; what is trained stays in float32."""
    return torch.autocast("cpu", torch.bfloat16)


PRECISIONS: Mapping[str, Callable[[], AbstractContextManager[object]]] = {"bfloat16": precision, "float32": nullcontext}


def steps(
    grid: Grid,
    run: Run,
    task: Problem,
    reader: nn.Module,
    precision: Callable[[], AbstractContextManager[object]] = precision,
) -> Iterator[tuple[float, float]]:
    """Loss and seconds of each step, which is taken when it is asked for; the last one's loss may not be finite."""
    arm = grid.arms[run.arm]
    assert run.rates is not None
    members = groups(reader.backbone, reader.head, run.rates)
    everything = [parameter for group in members for parameter in group["params"]]
    optimizer = torch.optim.AdamW(members)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, rate_at(run.steps, grid.training["warmup"], FALLS[arm.schedule])
    )
    reader.train()
    for rows in task.batches(run.seed, run.steps):
        start = perf_counter()
        # Not around the loop: the casts of weights are kept until the context ends, and trained weights would go stale.
        with precision():
            loss = task.loss(reader, rows)
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            nn.utils.clip_grad_norm_(everything, grid.training["max_gradient_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        yield value, perf_counter() - start
        if not math.isfinite(value):
            return


FALLS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""What is left of the rate by the share of the steps after the warm-up that is done."""


def rate_at(steps: int, warmup: float, falls: Callable[[float], float]) -> Callable[[int], float]:
    """The factor on all rates by step: it rises over a share of the steps, then falls as one of `FALLS` says."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return falls((step - rising) / max(1, steps - rising))

    return factor
