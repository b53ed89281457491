"""Lays out short runs: copies of PEFT's scripts, our folders with few steps; for a trial tiny models and data, too."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.yardstick.environment import comparison
from benchmarks.yardstick.experiments import TRAINING_FILE, Experiment
from benchmarks.yardstick.running import place
from benchmarks.yardstick.tasks import Task
from benchmarks.yardstick.tryout.language_model import write_language_model
from benchmarks.yardstick.tryout.text import write_text

MODEL = "stand-in/{task}"
"""The name that a row has, so that nobody takes it for one of the real model."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


TINY: dict[str, Any] = {
    "max_steps": 4,
    "eval_steps": 2,
    "batch_size_eval": 25,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 40},
}
"""What a trial changes in the training parameters, beside the model."""


def prepare(task: Task, checkout: Path, folder: Path) -> Path:
    """Lay out the trial of a task.

    Returns:
        The task's folder in it, as `copied` makes it, with the stand-ins.

    Raises:
        RuntimeError: a copied script is not as PEFT has it.
    """
    target = copied(task, checkout, folder)
    write_text(target)
    write_language_model(target / MODEL.format(task=task.name))
    return target


def copied(task: Task, checkout: Path, folder: Path) -> Path:
    """Copy the scripts of a task, so that rows of few steps are not among those of whole runs.

    Returns:
        The task's folder: the copy of PEFT's, without its experiments and rows.

    Raises:
        RuntimeError: a copied script is not as PEFT has it.
    """
    source, target = comparison(checkout), comparison(folder)
    shutil.rmtree(target / task.name, ignore_errors=True)
    shutil.copytree(source / task.name, target / task.name, ignore=shutil.ignore_patterns("experiments", "*--*.json"))
    shutil.copy2(source / "processing.py", target)
    check_copies(task, checkout, folder)
    return target / task.name


def check_copies(task: Task, checkout: Path, folder: Path) -> None:
    """Check that a trial's scripts are PEFT's, byte for byte.

    Raises:
        RuntimeError: one is not.
    """
    source, target = comparison(checkout), comparison(folder)
    scripts = [Path(task.name, file.name) for file in (source / task.name).glob("*.*") if file.is_file()]
    _, different, missing = filecmp.cmpfiles(source, target, [*scripts, Path("processing.py")], shallow=False)
    if different or missing:
        raise RuntimeError(f"{target}: {(different + missing)[0]} is not as PEFT has it; start the trial again")


def place_short(experiment: Experiment, task_folder: Path, changes: dict[str, Any]) -> None:
    """Put an experiment among the copies: its configuration as it is, its training parameters changed."""
    file = task_folder / place(experiment, task_folder) / TRAINING_FILE
    params = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(params | changes, indent=2) + "\n", encoding="utf-8")
