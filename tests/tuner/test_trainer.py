"""transformers' Trainer: a run that was killed goes on as if nothing had happened."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tuner import trained_by_trainer
from tests.tuner.trained_by_trainer import SAVED_EVERY, STEPS

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", trained_by_trainer.__name__, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)


def outcome(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = outcome(run(tmp_path / "whole"))
    assert whole["steps_made"] == STEPS
    assert list(whole["losses"]) == [str(step) for step in range(1, STEPS + 1)]
    killed = run(tmp_path / "killed", str(SAVED_EVERY + 2))
    assert killed.returncode == -signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "killed").iterdir()] == [f"checkpoint-{SAVED_EVERY}"]
    assert outcome(run(tmp_path / "killed")) == {**whole, "steps_made": STEPS - SAVED_EVERY}
