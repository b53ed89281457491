"""One run of the grid, from a fresh model to its row."""

import math
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.quality.adapting import adapted, round_to_half, saved_bytes
from benchmarks.quality.evaluation import Evaluation, packed
from benchmarks.quality.grid import Grid, Rates, Run
from benchmarks.quality.labelled import problem
from benchmarks.quality.models import FINE_TUNED, quietly
from benchmarks.quality.training import PRECISIONS, trained
from materials.fetch import build_once


def carry_out(grid: Grid, run: Run) -> dict[str, Any]:
    """The row of a run; what goes wrong in it is a row too."""
    start = perf_counter()
    try:
        with quietly():
            outcome = _outcome(grid, run)
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    row = {"key": run.key, **vars(run), "rates": run.rates and vars(run.rates)}
    return {**row, **outcome, "seconds": round(perf_counter() - start, 2)}


def fine_tune_minilm(grid: Grid) -> None:
    """Train all of MiniLM on WordNet's topics, once: a base that was itself fine-tuned before it is adapted."""

    def build(folder: Path) -> None:
        plan = grid.tasks["wordnet_topics"]
        task = problem("wordnet_topics", plan)
        reader = task.model("float32")
        reader.backbone.requires_grad_(True)
        seed = grid.training["tuning_seed"]
        run = Run("wordnet_topics", "full", "trial", seed, plan.steps, Rates(1e-4, None, 1e-3))
        assert not trained(grid, run, task, reader)["diverged"]
        reader.backbone.save_pretrained(folder)  # type: ignore[operator]

    build_once(FINE_TUNED, build)


def _outcome(grid: Grid, run: Run) -> dict[str, Any]:
    arm, plan = grid.arms[run.arm], grid.plan(run.task, run.arm)
    task = problem(run.task, plan)
    if arm.method == "majority":
        row = _evaluated(task.commonest("validation"), task.commonest("test"))
        # What the items of every row of this task are compared with.
        return row if task.reference is None else row | {"reference": packed(task.reference)}
    if arm.base == "fine_tuned":
        fine_tune_minilm(grid)
    reader = task.model(arm.base)
    if arm.method == "frozen":
        return _evaluated(task.evaluate(reader, "validation"), task.evaluate(reader, "test"))
    reader.backbone = adapted(reader.backbone, arm, grid.layers[plan.model], run.seed)
    row = {"trained_values": sum(each.numel() for each in reader.backbone.parameters() if each.requires_grad)}
    row |= trained(grid, run, task, reader)
    if row["diverged"]:
        return row | {"validation": None}
    reader.eval()
    with PRECISIONS[grid.training["products"]]():
        validation = task.evaluate(reader, "validation")
        if run.stage == "trial":
            return row | {"validation": _scores(validation)}
        row |= _evaluated(validation, task.evaluate(reader, "test"))
        if arm.refit:
            trained_head, reader.head = reader.head, task.fitted(reader, "batches")
            row["refitted"] = {part: _scores(task.evaluate(reader, part)) for part in ("validation", "test")}
            reader.head = trained_head
        with tempfile.TemporaryDirectory() as folder:
            row |= saved_bytes(reader.backbone, Path(folder))
        if run.seed == 0:
            round_to_half(reader.backbone)
            row["test_in_half"] = _scores(task.evaluate(reader, "test"))
    return row


def _evaluated(validation: Evaluation, test: Evaluation) -> dict[str, Any]:
    scores = {"validation": _scores(validation), "test": _scores(test)}
    return {**scores, "test_items": len(test.items), "items": packed(test.items)}


def _scores(evaluation: Evaluation) -> dict[str, float | None]:
    """Loss and score; None where one is not finite, which JSON cannot hold."""
    scores = {"loss": evaluation.loss, "score": evaluation.score}
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
