"""The command: `python -m benchmarks.quality.pace` times whole training steps of the grid, of several arms in turns.

Its ratios say how many steps of LoRA r=1 fit into the time of a run of another method.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.environment import machine
from benchmarks.quality.adapting import adapted
from benchmarks.quality.grid import Grid, Rates, Run, read_grid
from benchmarks.quality.labelled import problem
from benchmarks.quality.models import quietly
from benchmarks.quality.page import LABELS, YARDSTICK
from benchmarks.quality.summary import NAMES
from benchmarks.quality.training import steps
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.speed.timing import ratios, spread
from benchmarks.tables import table, text

ARMS = (
    *("magnitude", "ia3", "hyperadapt", "road", "lora_r2", "lora_r8", "vera_r256"),
    *("structured_r16", "structured_r64", "structured_r256"),
)
"""Beside LoRA r=1."""
WARM_UP, STEPS = 5, 50


def timed(grid: Grid, task_name: str, count: int = STEPS) -> list[Row]:
    """The rows of a task: `count` steps of every arm, by one thread."""
    plan = grid.tasks[task_name]
    task = problem(task_name, plan)
    runs = {}
    for arm in (YARDSTICK, *ARMS):
        with quietly():
            reader = task.model("float32")
            reader.backbone = adapted(reader.backbone, grid.arms[arm], grid.layers[plan.model], seed=0)
        rates = Rates(1e-4, 1e-4 if grid.arms[arm].magnitude else None, 1e-4)
        # The same batches for all.
        runs[arm] = steps(grid, Run(task_name, arm, "trial", 0, WARM_UP + count, rates), task, reader)
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    order = [*runs]
    for _ in range(WARM_UP + count):
        for arm in order:
            seconds[arm].append(next(runs[arm])[1])
        order.reverse()
    rows = []
    for arm in ARMS:
        low, median, high = spread(ratios(seconds[arm][WARM_UP:], seconds[YARDSTICK][WARM_UP:]))
        rows.append(
            {
                **{"key": f"{task_name} {arm}", "task": task_name, "arm": arm, "machine": machine(), "steps": count},
                **{"milliseconds": round(1000 * float(np.median(seconds[arm][WARM_UP:])), 2)},
                **{"ratio": [round(value, 4) for value in (low, median, high)]},
            }
        )
    return rows


def main() -> None:
    """Time all tasks with labels, or those that are named."""
    grid, file = read_grid(), file_of("pace")
    torch.set_num_threads(1)
    for task in sys.argv[1:] or [name for name in NAMES if name != "cron_expressions"]:
        rows = timed(grid, task)
        for row in rows:
            Console(stderr=True).print(f"{row['key']}: {row['milliseconds']} ms, {row['ratio'][1]:.3f} of LoRA r=1's")
        write(file, {**read_rows(file), **{row["key"]: row for row in rows}}.values())


def parts(content: Mapping[str, Any]) -> dict[str, str]:
    """The generated part of docs/results.md about the time of a step."""
    rows: Sequence[Row] = content["rows"]
    tasks = [name for name in NAMES if any(row["task"] == name for row in rows)]
    of = {(row["task"], row["arm"]): row["ratio"] for row in rows}
    shown = [(LABELS[arm], *(f"{of[task, arm][1]:.2f}" for task in tasks)) for arm in ARMS]
    return {
        "pace": text(
            table(("a step, in LoRA r=1's", *(NAMES[task] for task in tasks)), shown),
            f"Whole steps with data and optimizer in bfloat16, one thread, {rows[0]['steps']} of each method in turns, "
            "medians of ratios (`benchmarks/results/pace.json`).",
        )
    }


if __name__ == "__main__":
    main()
