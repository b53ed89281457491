"""The record of a run: what is written when it starts, and whether a recorded run can be resumed."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..data.run_data import Data
from ..run_folder import CONFIG, LOCK, is_leftover, world_size
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


def check_resumable(folder: Path, record: dict[str, Any] | None, settings: Settings, resume: bool) -> None:
    """Refuse to write into a folder that holds something else.

    Raises:
        ValueError: it does; the message says what it holds and what to do.
    """
    if record is None:
        # An empty folder holds nothing that could be lost: a run that was killed early leaves one for checkpoints.
        paths = [path for path in folder.iterdir() if not _is_empty(path)] if folder.is_dir() else []
        others = [path.name for path in paths if path.name not in (LOCK, CONFIG) and not is_leftover(path.name)]
        if others:
            raise ValueError(f"{folder} is not empty (it holds {others[0]}); choose another output folder")
        return
    if not resume:
        state = "a finished run" if record["state"] == "finished" else "an unfinished run"
        way = "shows it" if record["state"] == "finished" else "goes on with it"
        raise ValueError(f"{folder} holds {state}; --resume {way}, --output NAME starts another")
    now = settings.model_dump(mode="json")
    # The folder may have been moved.
    changed = [key for key, value in now.items() if key != "output" and record["settings"].get(key) != value]
    if changed:
        which = ", ".join(f"{key} {record['settings'].get(key)!r} is now {now[key]!r}" for key in changed)
        raise ValueError(f"the run in {folder} was started with other settings ({which}); choose another output folder")
    if record["state"] == "finished":
        return
    if not {"data", "processes", "seconds"} <= record.keys():
        raise ValueError(f"the record of the run in {folder} is damaged; choose another output folder")
    if record["processes"] != world_size():
        raise ValueError(
            f"the run in {folder} was started with {record['processes']} processes, not {world_size()}; start as many"
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
