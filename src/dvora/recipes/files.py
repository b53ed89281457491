"""Files and folders that are whole or not there: written under another name, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, or leave what was there before.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of the one of its name when everything is written.

    A link stays one to what is written; a pipe or a device, such as /dev/null, is written to as it is.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            yield stream
        return
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner only.
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when everything in it is there.

    Args:
        path: that must not exist, or be an empty folder.

    Raises:
        FileExistsError: it exists and is not empty.
        OSError: it cannot be written; nothing of it is left.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another name or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    filled = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield filled
        filled.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        filled.rename(path)
    except BaseException:
        shutil.rmtree(filled, ignore_errors=True)
        raise


def _umask() -> int:
    """The permissions that new files do not get; it can only be asked for by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
