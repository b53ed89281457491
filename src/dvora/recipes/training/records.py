"""The record of a run as it starts."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..data.run_data import Data
from ..run_folder import world_size
from ..settings import Settings

PACKAGES = ("dvora", "torch", "peft", "transformers", "accelerate", "datasets", "tokenizers", "numpy")


def start_record(settings: Settings, data: Data, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """What is known when training starts or resumes.

    Raises:
        ValueError: a data file is not what it was when the run started.
    """
    record = {
        "state": "started",
        "settings": settings.model_dump(mode="json"),
        "labels": list(data.labels),
        "data": data.record,
        "notes": list(data.notes),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "processes": world_size(),
        "seconds": earlier["seconds"] if earlier else 0.0,
    }
    if earlier and earlier["data"]["files"] != data.record["files"]:
        changed = [path for path, found in data.record["files"].items() if earlier["data"]["files"].get(path) != found]
        raise ValueError(f"{changed[0]} has changed since the run started; start another one, into another folder")
    return record


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
