"""Checkpoints of a run that goes on after any end: each is marked when all of it is written."""

import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...whole_files import remove, write_atomically
from ..files import read_json

CHECKPOINT = re.compile(r"checkpoint-\d+")
MARK = "complete.json"
"""The names and sizes of a checkpoint's files, written last."""


def mark_complete(checkpoint: Path) -> None:
    """Say that all files of a checkpoint are there."""
    sizes = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != MARK
    }
    write_atomically(checkpoint / MARK, json.dumps(sizes, indent=1).encode())


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is marked and has what its mark names: its removal may have begun after it was marked."""
    try:
        sizes = read_json(checkpoint / MARK)
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, by step."""
    paths = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(filter(is_complete, paths), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_all_but(complete: Sequence[Path], folder: Path) -> None:
    """Remove what an unclean end left half-written or half-removed beside the complete checkpoints of a folder."""
    for path in folder.glob("checkpoint-*"):
        if path not in complete:
            remove(path)


@contextmanager
def errors_of_damage(checkpoint: Path | None) -> Iterator[None]:
    """Name the checkpoint that cannot be resumed from; torch reads tensors and numbers from it, and refuses the rest.

    Raises:
        ValueError: it is damaged, or holds pickled objects.
    """
    try:
        with warnings.catch_warnings():
            # What is written in other versions of pickle's format is read or refused with an error.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged or holds pickled objects, which are never loaded; remove that "
            "folder to go on from the one before it"
        ) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(f"{checkpoint} is damaged; remove that folder to go on from the one before it") from error
