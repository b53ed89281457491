"""AdapterHub's DVoRA, in an environment of its own: the package `adapters` pins another version of transformers.

The environment is made anew in a temporary folder. dvora and PEFT are there too, so that all are timed in turns.
"""

import json
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

import torch

import dvora
from benchmarks.speed.runner import Report

ROOT = Path(__file__).parent.parent.parent
ADAPTERS = "adapters==1.3.0"
SAME_VERSION = ("torch", "peft", "numpy", "safetensors", "rich")


def measure(report: Report, rounds: int) -> None:
    """Time its DVoRA beside ours on a model with square layers, the only ones that it can adapt."""
    with tempfile.TemporaryDirectory() as folder:
        report.attempt("AdapterHub's DVoRA", lambda: _measure(report, Path(folder), rounds))


def _measure(report: Report, folder: Path, rounds: int) -> None:
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pinned = [f"{package}=={version(package).partition('+')[0]}" for package in SAME_VERSION]
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ADAPTERS, *pinned])
    sources = [str(ROOT), str(Path(dvora.__file__).parent.parent)]
    steps = Path(__file__).with_name("adapterhub_steps.py")
    found = json.loads(_run([python, steps, str(rounds), str(torch.get_num_threads()), *sources]).splitlines()[-1])
    report.rows.extend(found["rows"])
    report.not_measured.extend(found["not_measured"])


def _run(command: list[str | Path]) -> str:
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    return process.stdout
