"""The folder of a training run: what is in it, and which process may write to it. No library of models is imported."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast

from ..whole_files import locked, remove, write_atomically
from .files import check_no_links, read_json
from .settings import NOTHING, Settings, Trust, checked_settings, resolved

RECORD, CONFIG, ADAPTER, CHECKPOINTS, LOCK = "run.json", "config.yaml", "adapter", "checkpoints", ".lock"
HEAD_FILE = "head.safetensors"
"""What the method "head" saves in the adapter's folder."""
HEAD_ALONE = "head_alone.safetensors"
"""The baseline: a linear layer fitted to the frozen base, see `tasks.head_alone`."""
HEAD_AT_START, HEAD_OUTPUTS = f"{CHECKPOINTS}/head_at_start.safetensors", f"{CHECKPOINTS}/head_outputs.safetensors"
"""Where training started, and outputs of the head alone for the held-out rows, until it is finished."""


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


class _Data(BaseModel):
    """What the record says of a run's data."""

    model_config = ConfigDict(strict=True)
    files: dict[str, Any] = {}
    columns: dict[str, str] = {}
    rows: dict[str, int] = {}


class _Record(BaseModel):
    """What is read of a record; when a run starts, some of it is not there yet."""

    model_config = ConfigDict(strict=True)
    state: str
    settings: dict[str, Any]
    labels: Annotated[list[str], FailFast()]
    data: _Data = _Data()
    metrics: dict[str, dict[str, Any]] = {}
    comparisons: dict[str, dict[str, Any]] = {}
    calibration: dict[str, float] = {}
    history: Annotated[list[dict[str, Any]], FailFast()] = []
    steps: int = 0
    best_step: int = 0
    trained_parameters: int = 0
    seconds: float = 0
    truncation: dict[str, dict[str, int]] = {}
    max_length: int = 0


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
    settings = checked_settings(record["settings"], str(folder / RECORD))
    return Run(folder, settings, tuple(record["labels"]), folder / ADAPTER, record, trust)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of run.json, finished or not; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    return read_json(path, kind=_Record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write run.json, whole or not at all; with the state "finished" this is what ends a run."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(folder / RECORD, (text + "\n").encode())


def labels_beside(adapter: Path) -> tuple[str, ...]:
    """The names of the classes, where an adapter lies in the folder of a run; else none.

    Raises:
        ValueError: the run's record is damaged.
    """
    file = adapter.parent / RECORD
    return checked_labels(read_json(file).get("labels") or [], file) if file.is_file() else ()


def checked_labels(labels: object, record: Path) -> tuple[str, ...]:
    """The names of the classes in a record.

    Raises:
        ValueError: they are no list of texts.
    """
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{record} is damaged: labels is not a list of names")
    return tuple(labels)


@dataclass(frozen=True)
class Place:
    """Where a run is trained.

    Args:
        settings: of the run, resolved.
        record: of an earlier start, from which this one goes on; None: it is the first.
    """

    settings: Settings
    record: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.settings.output)


@contextmanager
def entered(settings: Settings, resume: bool = False) -> Iterator[Place]:
    """The folder of a run, made if it is not there, for this process and those that train with it alone.

    Args:
        settings: of the run; they are resolved.
        resume: go on with what is in the folder.

    Raises:
        ValueError: it holds something else, or another process works in it.
    """
    settings = resolved(settings)
    folder = Path(settings.output)
    # A name on the hub has one slash at most, and begins with neither of these.
    is_path = settings.model.startswith((".", "/", "~")) or settings.model.count("/") > 1
    for name in () if resume else (*settings.all_data, *[settings.model] * is_path):
        if not Path(name).exists():
            raise ValueError(f"{name}: no such file or folder")
    for path in folder.iterdir() if folder.is_dir() and not (folder / RECORD).exists() else ():
        # An empty folder holds nothing that could be lost: a run that was killed early leaves one for checkpoints.
        is_empty = path.is_dir() and not any(path.iterdir())
        if not is_empty and path.name not in (LOCK, CONFIG) and not is_leftover(path.name):
            raise ValueError(f"{folder} is not empty (it holds {path.name}); choose another output folder")
    with alone_in(folder) if is_first() else nullcontext():
        record = read_record(folder)
        if record is not None:
            _check_resumable(folder, record, settings, resume)
        yield Place(settings, record)


def _check_resumable(folder: Path, record: dict[str, Any], settings: Settings, resume: bool) -> None:
    finished = record["state"] == "finished"
    if not resume:
        state, way = ("a finished", "shows") if finished else ("an unfinished", "goes on with")
        raise ValueError(f"{folder} holds {state} run; --resume {way} it, --output NAME starts another")
    now, before = settings.model_dump(mode="json"), record["settings"]
    # The folder may have been moved.
    if changed := [key for key, value in now.items() if key != "output" and before.get(key) != value]:
        which = ", ".join(f"{key} {before.get(key)!r} is now {now[key]!r}" for key in changed)
        raise ValueError(f"the run in {folder} was started with other settings ({which}); choose another output folder")
    if not finished and not {"data", "processes", "seconds"} <= record.keys():
        raise ValueError(f"the record of the run in {folder} is damaged; choose another output folder")
    if not finished and record["processes"] != world_size():
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
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; however this process ends, the system opens the lock then.

    Raises:
        ValueError: another process works in it, or it holds what no run makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_no_links(folder, lambda name: name in (ADAPTER, CHECKPOINTS) or is_leftover(name))
    busy = ValueError(f"another run works in {folder}; wait for it, or choose another folder")
    with locked(folder / LOCK, busy=busy):
        yield


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
