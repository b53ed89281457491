"""The folder of a training run: what is in it, and which process may write to it. No library of models is imported."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..whole_files import remove, write_atomically
from .files import check_no_links, read_json
from .settings import NOTHING, Settings, Trust, checked_settings

RECORD, CONFIG, ADAPTER, CHECKPOINTS, LOCK = "run.json", "config.yaml", "adapter", "checkpoints", ".lock"
HEAD_FILE = "head.safetensors"
"""What the method "head" saves in the adapter's folder."""
HEAD_ALONE = "head_alone.safetensors"
"""The baseline: a linear layer fitted to the frozen base, see `tasks.head_alone`."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: of the run.
        settings: resolved: paths are absolute, what the method decides is written out.
        labels: names of the classes 0, 1, ...; empty where numbers or tokens are predicted.
        adapter: the folder that PEFT reads; for the method "full" a whole model, for "head" its `head.safetensors`.
        record: everything in run.json: versions, data hashes, split sizes, what was cut, metrics, seconds.
        trust: what the reader allows when the run's model is loaded.
    """

    folder: Path
    settings: Settings
    labels: tuple[str, ...]
    adapter: Path
    record: Mapping[str, Any]
    trust: Trust = NOTHING


_FINISHED: Mapping[str, type | tuple[type, ...]] = {
    "data": dict, "metrics": dict, "history": list, "steps": int, "best_step": int, "trained_parameters": int,
    "seconds": (int, float), "truncation": dict, "max_length": int,
}  # fmt: skip
"""What the record of a finished run may have beside its state, settings and labels."""
_DATA: Mapping[str, type] = {"files": dict, "columns": dict, "rows": dict}


def read_run(folder: Path, trust: Trust = NOTHING) -> Run:
    """A finished run.

    Args:
        folder: of the run.
        trust: what is allowed when its model is loaded; its record can allow nothing.

    Raises:
        ValueError: there is no run, it is not finished, or its record is damaged.
    """
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no {RECORD}, so it is not the folder of a run of `dvora train`")
    if record["state"] != "finished":
        raise ValueError(f"the run in {folder} is not finished; go on with `dvora train {folder / CONFIG} --resume`")
    _check_kinds(record, _FINISHED, folder / RECORD)
    _check_kinds(record.get("data", {}), _DATA, folder / RECORD)
    settings = checked_settings(record["settings"], str(folder / RECORD))
    return Run(folder, settings, checked_labels(record["labels"], folder / RECORD), folder / ADAPTER, record, trust)


def checked_labels(labels: object, record: Path) -> tuple[str, ...]:
    """The names of the classes in a record.

    Raises:
        ValueError: they are no list of texts.
    """
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{record} is damaged: labels is not a list of names")
    return tuple(labels)


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], file: Path) -> None:
    for name, kind in kinds.items():
        if name in values and not isinstance(values[name], kind):
            raise ValueError(f"{file} is damaged: {name} is not what `dvora train` writes")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of run.json, finished or not; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if not {"state", "settings", "labels"} <= record.keys():
        raise ValueError(f"{path} is not the record of a run of `dvora train`")
    if not isinstance(record["settings"], dict):
        raise ValueError(f"{path} is damaged: settings is no table of names and values")
    return record


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all; with the state "finished" this is what ends a run."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / RECORD, (text + "\n").encode())


def check_resumable(folder: Path, record: dict[str, Any] | None, settings: Settings, resume: bool) -> None:
    """Refuse to write into a folder that holds something else.

    Raises:
        ValueError: it does; the message says what it holds and what to do.
    """
    if record is None:
        for path in folder.iterdir() if folder.is_dir() else ():
            # An empty folder holds nothing that could be lost: a run that was killed early leaves one for checkpoints.
            is_empty = path.is_dir() and not any(path.iterdir())
            if not is_empty and path.name not in (LOCK, CONFIG) and not is_leftover(path.name):
                raise ValueError(f"{folder} is not empty (it holds {path.name}); choose another output folder")
        return
    if not resume:
        finished = record["state"] == "finished"
        state, way = ("a finished", "shows") if finished else ("an unfinished", "goes on with")
        raise ValueError(f"{folder} holds {state} run; --resume {way} it, --output NAME starts another")
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


def is_leftover(name: str) -> bool:
    """Whether a run that was killed while it wrote a file or the adapter left this behind."""
    return name.startswith(tuple(f".{written}." for written in (RECORD, CONFIG, ADAPTER)))


def remove_leftovers(folder: Path) -> None:
    """Remove what is left of such a run; only while the folder is locked."""
    for path in folder.iterdir():
        if is_leftover(path.name):
            remove(path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; however this process ends, the system opens the lock then.

    Raises:
        ValueError: another process works in it, or it holds what no run makes.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    check_no_links(folder, lambda name: name in (ADAPTER, CHECKPOINTS) or is_leftover(name))
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another run works in {folder}; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def world_size() -> int:
    """How many processes train together, as accelerate launch and torchrun set it."""
    return _number_in("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which of this machine's accelerators this process uses."""
    return _number_in("LOCAL_RANK", 0)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return _number_in("RANK", 0) == 0


def _number_in(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        raise ValueError(
            f"the environment variable {variable} is {value!r}, expected a whole number as accelerate launch and "
            "torchrun set it; unset it to train in one process"
        )
    return int(value)
