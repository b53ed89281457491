"""The environment of a measurement: versions, processor and threads, for the head of every result file."""

import os
import platform
from importlib.metadata import version

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
