"""Rows of runs: whether PEFT's own processing takes them, where they are kept, and how they compare."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any, cast

from benchmarks.yardstick.experiments import Experiment, of_task
from benchmarks.yardstick.running import row_file
from benchmarks.yardstick.tasks import ROWS, Task

SMALL = 2_000_000
"""The table has the methods that train at most as many parameters."""


def processed(task: Task, comparison: Path) -> Any:
    """The table of a task as PEFT's app shows it: every row went through PEFT's own processing, and none was skipped.

    Returns:
        A pandas DataFrame.

    Raises:
        ValueError: PEFT's processing skips a row of ours.
    """
    spec = importlib.util.spec_from_file_location("peft_processing", comparison / "processing.py")
    assert spec is not None
    assert spec.loader is not None
    processing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processing)
    folder = comparison / task.name
    table = processing.load_df(str(folder / "results"), task.name, print_fn=lambda *_: None)
    ours = {experiment.full_name for experiment in of_task(task.name) if row_file(experiment, folder).is_file()}
    if skipped := ours - set(table["experiment_name"]):
        raise ValueError(
            f"PEFT's processing skips the rows of {', '.join(sorted(skipped))}: their runs did not succeed"
        )
    return table


def keep(experiment: Experiment, task_folder: Path) -> Path:
    """Copy a row to where rows are kept, as it is.

    Returns:
        The copy.
    """
    source = row_file(experiment, task_folder)
    target = ROWS / experiment.task / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source, target))


def describe(task: Task, table: Any) -> str:
    """The small methods of a task's table as lines of text, the best first; ours are marked."""
    small = table[table["num_trainable_params"] <= SMALL].sort_values(task.metric, ascending=False)
    ours = {experiment.full_name for experiment in of_task(task.name)}
    lines = [f"{task.name}: {task.metric} of methods with at most {SMALL:,} parameters"]
    for row in cast("list[dict[str, Any]]", small.to_dict("records")):
        mark = "*" if row["experiment_name"] in ours else " "
        lines.append(
            f"{mark} {row[task.metric]:6.1%}  {row['num_trainable_params']:>9,}  {row['experiment_name']}  "
            f"({row['model_id']}, PEFT {row['peft_version']}, {row['created_at']:%Y-%m-%d})"
        )
    return "\n".join(lines)
