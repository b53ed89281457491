"""The environment of a measurement: versions and threads for the head of a result file, the machine for its rows."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("dvora", "torch", "numpy", "peft", "transformers")


def environment() -> dict[str, object]:
    """Versions, system, processor count and torch threads, as plain JSON values."""
    return {
        "python": platform.python_version(),
        **{package: version(package).partition("+")[0] for package in _PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def machine() -> str:
    """Processor and cores, for the rows of a file that several machines may have made."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """By the name that Linux knows, with family and model, since a virtual machine may hide the rest; else the kind."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    known = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if len(known) < 3:
        return platform.machine()
    return f"{known['model name']} (family {known['cpu family']}, model {known['model']})"
