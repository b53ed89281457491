"""The command: `python -m benchmarks.quality.pace` times whole training steps of the grid, of several arms in turns.

Its ratios say how many steps of LoRA r=1 fit into the time of a run of another method.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.environment import machine
from benchmarks.quality.adapting import adapted
from benchmarks.quality.grid import FILE, Grid, Rates, Run, read_grid
from benchmarks.quality.labelled import problem
from benchmarks.quality.models import quietly
from benchmarks.quality.page import LABELS, YARDSTICK
from benchmarks.quality.summary import LABELLED
from benchmarks.quality.training import PRECISIONS, steps
from benchmarks.results import Row, file_of, read_rows, write
from benchmarks.speed.timing import interleaved, ratios, spread
from benchmarks.tables import span, table, text

ARMS = (
    *("magnitude", "ia3", "hyperadapt", "road", "road_4", "lora_r2", "lora_r4", "lora_r8", "vera_r256"),
    "dvora_r256",
)
"""Beside LoRA r=1."""
WARM_UP, STEPS = 5, 50


def timed(grid: Grid, task_name: str, arms: Sequence[str], count: int = STEPS, dtype: str = "bfloat16") -> list[Row]:
    """The rows of a task: processor time of `count` steps of every arm, by one thread, with products in a dtype."""
    plan = grid.tasks[task_name]
    task = problem(task_name, plan)
    runs = {}
    for arm in (YARDSTICK, *arms):
        with quietly():
            reader = task.model("float32")
            reader.backbone = adapted(reader.backbone, grid.arms[arm], grid.layers[plan.model], seed=0)
        rates = Rates(1e-4, 1e-4 if grid.arms[arm].magnitude else None, 1e-4)
        # The same batches for all.
        run = Run(task_name, arm, "trial", 0, WARM_UP + count, rates)
        runs[arm] = steps(grid, run, task, reader, PRECISIONS[dtype])
    seconds, _ = interleaved(
        {arm: partial(next, run) for arm, run in runs.items()}, count, WARM_UP, at_least=0, clock=process_time
    )
    rows = []
    for arm in arms:
        low, median, high = spread(ratios(seconds[arm], seconds[YARDSTICK]))
        rows.append(
            {
                **{"key": f"{task_name} {arm} {dtype}", "task": task_name, "arm": arm, "dtype": dtype},
                **{"machine": machine(), "steps": count},
                **{"milliseconds": round(1000 * float(np.median(seconds[arm])), 2)},
                **{"ratio": [round(value, 4) for value in (low, median, high)]},
            }
        )
    return rows


def main() -> None:
    """Time all tasks with labels, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.pace", description=main.__doc__)
    parser.add_argument("tasks", nargs="*", help="left out, all")
    parser.add_argument("--grid", type=Path, default=FILE, help="another file like benchmarks/quality/equal_bytes.yaml")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16", help="of products; the grid's by default")
    parser.add_argument("--arm", nargs="+", default=ARMS, help="beside LoRA r=1; left out, all")
    parser.add_argument(
        "--output", help="a name in benchmarks/results/; left out, pace, with another grid its name too"
    )
    chosen = parser.parse_args()
    usual = "pace" if chosen.grid == FILE else f"{chosen.grid.stem}_pace"
    grid, file = read_grid(chosen.grid), file_of(chosen.output or usual)
    torch.set_num_threads(1)
    for task in chosen.tasks or [name for name in LABELLED if name in grid.tasks]:
        rows = timed(grid, task, chosen.arm, dtype=chosen.dtype)
        for row in rows:
            Console(stderr=True).print(f"{row['key']}: {row['milliseconds']} ms, {row['ratio'][1]:.3f} of LoRA r=1's")
        write(file, {**read_rows(file), **{row["key"]: row for row in rows}}.values())


def pace(content: Mapping[str, Any]) -> str:
    """The time of a step of every method, as a table."""
    rows: Sequence[Row] = content["rows"]
    dtypes, lines = [*dict.fromkeys(row["dtype"] for row in rows)], []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        medians = [[row["ratio"][1] for row in rows if (row["arm"], row["dtype"]) == (arm, d)] for d in dtypes]
        if not all(medians):
            continue
        lines.append((LABELS[arm], *(f"{min(of_tasks):.2f} to {max(of_tasks):.2f}" for of_tasks in medians)))
    return text(
        table(("a step, in LoRA r=1's", *dtypes), lines),
        f"Whole steps with data and optimizer, one thread, {span(row['steps'] for row in rows)} of each method in "
        "turns: the least and the most of the tasks' medians (`pace.json`; five tasks, in float32 two).",
    )


if __name__ == "__main__":
    main()
