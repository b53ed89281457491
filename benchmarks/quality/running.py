"""One run of the grid, from a fresh model to its row."""

import math
import os
import resource
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import nn

from benchmarks.quality.adapting import adapted, round_to_half, saved_bytes
from benchmarks.quality.backbones import quietly
from benchmarks.quality.baselines import baseline
from benchmarks.quality.evaluation import Evaluation
from benchmarks.quality.fine_tuned import fine_tuned_minilm
from benchmarks.quality.grid import BASELINES, Grid, Run
from benchmarks.quality.items import packed
from benchmarks.quality.problems import problem
from benchmarks.quality.processes import in_a_fresh_process
from benchmarks.quality.training import precision, trained


def carry_out(grid: Grid, run: Run) -> dict[str, Any]:
    """The row of a run; what goes wrong in it is a row too."""
    start = perf_counter()
    head = {
        "key": run.key,
        "task": run.task,
        "arm": run.arm,
        "stage": run.stage,
        "seed": run.seed,
        "steps": run.steps,
        "rates": None if run.rates is None else vars(run.rates),
    }
    try:
        with quietly():
            found = in_a_fresh_process(_found, grid, run) if run.stage == "alone" else _found(grid, run)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return {**head, **found, "seconds": round(perf_counter() - start, 2)}


def _found(grid: Grid, run: Run) -> dict[str, Any]:
    arm, plan = grid.arms[run.arm], grid.tasks[run.task]
    task = problem(run.task, plan)
    if arm.method in BASELINES:
        evaluations = baseline(arm.method, run.task, plan, task)
        row: dict[str, Any] = _evaluation_row(*evaluations)
        # What the items of every row of this task are compared with.
        return row if task.reference is None else row | {"reference": packed(task.reference)}
    if arm.base == "fine_tuned":
        fine_tuned_minilm(grid)
    reader = task.model(arm.base)
    if arm.method == "untrained":
        return _evaluation_row(*(task.evaluate(reader, part) for part in ("validation", "test")))
    seed = run.seed if arm.projection_seed is None else arm.projection_seed
    alone = run.stage == "alone"
    loaded = _resident_with(reader) if alone else None
    reader.backbone = adapted(reader.backbone, arm, grid.layers[plan.model], seed)
    count = sum(each.numel() for each in reader.backbone.parameters() if each.requires_grad)
    row = {"trained_values": count}
    row |= trained(grid, run, task, reader)
    if alone:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return row | {"loaded_bytes": loaded, "peak_bytes": peak}
    if row["diverged"]:
        return row | {"validation": None}
    reader.eval()
    with precision(arm):
        validation = task.evaluate(reader, "validation")
        if run.stage != "final":
            return row | {"validation": _scores(validation)}
        row |= _evaluation_row(validation, task.evaluate(reader, "test"))
        with tempfile.TemporaryDirectory() as folder:
            row |= saved_bytes(reader.backbone, Path(folder))
        if run.seed == 0:
            round_to_half(reader.backbone)
            row["test_in_half"] = _scores(task.evaluate(reader, "test"))
    return row


def _resident_with(model: nn.Module) -> int:
    """Bytes of memory that this process holds now, all parameters of the model included.

    A mapped file takes no memory until it is read, so all are read first.
    """
    for parameter in model.parameters():
        parameter.detach().sum()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _evaluation_row(validation: Evaluation, test: Evaluation) -> dict[str, Any]:
    return {
        "validation": _scores(validation),
        "test": _scores(test),
        "test_items": len(test.items),
        "items": packed(test.items),
    }


def _scores(evaluation: Evaluation) -> dict[str, float | None]:
    """Loss and score; None where one is not finite, which JSON cannot hold."""
    found = {"loss": evaluation.loss, "score": evaluation.score}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
