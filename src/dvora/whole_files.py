"""Files and folders that appear whole or not at all: written under another name, then renamed."""

import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RANDOM = r"[a-z0-9_]{8}"
"""How the names of unfinished files end, after a dot and that of the file: a killed process leaves these."""


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

    A link of that name is replaced, see `typed`; a pipe or a device, such as /dev/null, is written to as it is.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    if path.exists() and not (path.is_symlink() or path.is_file() or path.is_dir()):
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
        _sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_readable(paths: Iterable[Path]) -> None:
    """Give files the permissions of new ones; safetensors writes them for their owner only."""
    for path in paths:
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def remove(path: Path) -> None:
    """Remove a file, a folder with everything in it, or a link, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def check_new_folder(path: Path) -> None:
    """Refuse a name that a new folder cannot take.

    Raises:
        FileExistsError: it is a link, or exists and is not an empty folder.
    """
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link; name the folder that it leads to, or remove it first")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another name or remove it first")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when everything in it is on the disk.

    Args:
        path: that must not exist, or be an empty folder.

    Raises:
        FileExistsError: it is a link, or exists and is not empty.
        OSError: it cannot be written; nothing of it is left.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(path) as filled:
        yield filled
        make_readable(filled.rglob("*"))
        for entry in filled.rglob("*"):
            _sync(entry)
        filled.chmod(0o777 & ~_umask())
        _sync(filled)
        if path.exists():
            path.rmdir()
        filled.rename(path)
        _sync(path.parent)


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that no other process fills, removed if something fails.

    Its name is always the same one, so what a killed process left is found and emptied; a living one holds a lock.
    What others put under that name is left alone.
    """
    folder = path.with_name(f".{path.name}.unfinished")
    with suppress(FileExistsError):
        folder.mkdir()
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or (fcntl is not None and state.st_uid != os.geteuid()):
        raise FileExistsError(f"{folder} is a link, a file or of another user; this command needs the name: remove it")
    busy = FileExistsError(f"another process is filling {path}; wait for it, or choose another name")
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, busy=busy))
        except OSError as error:
            # Else of a file system without locks.
            if error is busy:
                raise
        try:
            for leftover in folder.iterdir():
                remove(leftover)
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def locked(
    path: Path, seconds: float = 0.0, *, is_shared: bool = False, busy: Exception | None = None
) -> Iterator[None]:
    """Hold the lock of a folder, or of a file, which is made; however a process ends, the system opens its locks.

    On Windows nothing is held.

    Args:
        path: of the folder or file.
        seconds: to wait for others.
        is_shared: whether others may hold it who share it too.
        busy: what is raised if another one holds it, by default a TimeoutError.

    Raises:
        OSError: it is a link, or cannot be opened, or its file system has no locks.
    """
    until = time.monotonic() + seconds
    while (descriptor := _lock(path, is_shared)) is None:
        if time.monotonic() >= until:
            raise busy or TimeoutError(f"another process holds the lock of {path}")
        time.sleep(0.01)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, is_shared: bool) -> int | None:
    """A descriptor that holds the lock; None if another one holds it."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    if path.is_symlink():
        raise FileExistsError(f"{path} is a link, and nothing is locked through one; remove it")
    descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT), 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX))
        # Whoever held it may have renamed or removed what is locked.
        is_held = path.exists() and os.path.samestat(os.fstat(descriptor), path.lstat())
    except BlockingIOError:
        is_held = False
    except BaseException:
        os.close(descriptor)
        raise
    if not is_held:
        os.close(descriptor)
    return descriptor if is_held else None


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk; links and pipes are left alone."""
    if sys.platform != "win32" and not path.is_symlink() and (path.is_file() or path.is_dir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
