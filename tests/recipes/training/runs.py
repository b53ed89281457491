"""Runs of every task that tests make, stop, and compare."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dvora.recipes.run_folder import Run as FinishedRun
from dvora.recipes.settings import Settings, checked_settings
from dvora.recipes.training.callbacks import OnProgress, Progress
from dvora.recipes.training.run import train
from tests.recipes.finished_runs import DATA


class Run:
    """Makes settings of one task, with data and model."""

    def __init__(self, models: dict[str, Path], folder: Path, task: str = "text-classification") -> None:
        model, name, write = DATA[task]
        self.task, self.model, self.folder = task, models[model], folder
        self.data = write(folder / name)

    def settings(self, output: str, **changes: Any) -> Settings:
        return checked_settings(
            {
                "task": self.task,
                "model": str(self.model),
                "data": str(self.data),
                "output": str(self.folder / output),
                "rank": 4,
                "epochs": 2,
                "cpu": True,
                # Tiny ones are often no better than the head alone.
                "if_no_better": "adapter",
                **changes,
            },
            "",
        )


def finished(settings: Settings, **options: Any) -> FinishedRun:
    """The run, trained to its end."""
    run = train(settings, **options).run
    assert run is not None
    return run


def signal_after(step: int, number: int = signal.SIGINT) -> OnProgress:
    """Sends this process a signal after a step."""

    def on_progress(progress: Progress) -> None:
        if progress.step == step and progress.metrics is None:
            os.kill(os.getpid(), number)

    return on_progress


def trained_parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "adapter").glob("*.safetensors")))


def assert_same(first: Path, second: Path) -> None:
    one, other = trained_parameters(first), trained_parameters(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (first, second)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["history"] == records[1]["history"]
