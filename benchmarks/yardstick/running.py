"""Puts our experiments beside PEFT's and runs those that have no row yet."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.yardstick.experiments import ADAPTER_FILE, TRAINING_FILE, Experiment, folder_of

ROOT = Path(__file__).parent.parent.parent
FILLED_IN = {"base_model_name_or_path", "base_probes"}
"""Settings that a run fills in."""

Row = dict[str, Any]


def place(experiment: Experiment, task_folder: Path) -> Path:
    """Copy an experiment's files to where PEFT's script looks for them.

    Returns:
        The folder's path as the script wants it, relative to the task's.
    """
    relative = Path("experiments", experiment.full_name)
    shutil.copytree(folder_of(experiment), task_folder / relative, dirs_exist_ok=True)
    return relative


def row_file(experiment: Experiment, task_folder: Path) -> Path:
    """Where PEFT's script writes the row of a run that ended well."""
    return task_folder / "results" / f"{experiment.method}--{experiment.name}.json"


def finished_row(experiment: Experiment, task_folder: Path) -> Row | None:
    """The row of an experiment, if there is one, it is of success, and of the settings that the folder has now."""
    file = row_file(experiment, task_folder)
    if not file.is_file():
        return None
    row: Row = json.loads(file.read_text(encoding="utf-8"))
    folder = task_folder / "experiments" / experiment.full_name
    is_current = _agrees(row["run_info"]["peft_config"], folder / ADAPTER_FILE) and _agrees(
        row["run_info"]["train_config"], folder / TRAINING_FILE
    )
    return row if is_current and row["train_info"]["status"] == "success" else None


def run(experiment: Experiment, task_folder: Path, options: Sequence[str] = ()) -> str | None:
    """Run PEFT's script on an experiment, which prints as it goes.

    Returns:
        Why there is no row of success now, or None.
    """
    path = Path("experiments", experiment.full_name)
    command = [sys.executable, "-m", "benchmarks.yardstick.launch", *options, "run.py", "-v", str(path)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = _canceled(experiment, task_folder)
    code = subprocess.run(command, cwd=task_folder, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
    if finished_row(experiment, task_folder) is not None:
        return None
    if canceled := sorted(_canceled(experiment, task_folder) - started):
        return f"canceled: {json.loads(canceled[-1].read_text(encoding='utf-8'))['run_info']['error_msg']}"
    return f"PEFT's script ended with status {code} and without a row; what it said is above"


def _canceled(experiment: Experiment, task_folder: Path) -> set[Path]:
    """Rows of runs that did not end well, of any time."""
    return set((task_folder / "cancelled_results").glob(f"{experiment.method}--{experiment.name}--*.json"))


def _agrees(recorded: Row, file: Path) -> bool:
    """Whether a row has the settings of a file; PEFT writes target modules in the order of a set."""

    def ordered(value: Any) -> Any:
        return sorted(value) if isinstance(value, list) else value

    settings: Row = json.loads(file.read_text(encoding="utf-8"))
    return all(
        ordered(recorded.get(name)) == ordered(value) for name, value in settings.items() if name not in FILLED_IN
    )
