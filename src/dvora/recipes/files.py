"""Files and folders that appear whole or not at all: written under another name, then renamed."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LARGEST_RECORD = 2**28
"""Bytes of a record; one that notes a loss at each of a million steps has a quarter of them."""


def typed(path: Path) -> Path:
    """Where to write a path that the user typed: where it is a link, to its target.

    Links under names that a command chooses itself are never followed.
    """
    return path.resolve() if path.is_symlink() else path


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
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_small(path: Path, at_most: int = LARGEST_RECORD) -> str:
    """The text of a file of settings, or of a record; pipes and devices are not waited for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, larger than that, or not UTF-8.
    """
    descriptor = os.open(path, os.O_RDONLY | (0 if fcntl is None else os.O_NONBLOCK))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise ValueError(f"{path} is larger than the {at_most:,} bytes that such a file may have")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def parsed_json(text: str) -> Any:
    """The value of a text in JSON.

    Raises:
        ValueError: it is not JSON, nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, at_most: int = LARGEST_RECORD) -> dict[str, Any]:
    """The names and values of a JSON file that is one object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, something else, or too large.
    """
    text = read_small(path, at_most)
    try:
        found = parsed_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is no table of settings")
    return found


def check_no_device(path: Path) -> None:
    """Refuse a pipe or a device, which a reader waits for, or reads without an end.

    Raises:
        ValueError: it is one.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a pipe or a device; only files and folders are read")


def check_readable(paths: Iterable[Path]) -> None:
    """Raise what keeps files from being read: libraries report files without permission as missing.

    Raises:
        OSError: the first file's.
        ValueError: one is a pipe or a device.
    """
    for path in paths:
        check_no_device(path)
        path.open("rb").close()


def check_no_links(folder: Path, inner: Callable[[str], bool]) -> None:
    """Refuse links, pipes and devices in a folder that a command writes to and removes things from.

    Args:
        folder: of the command's results.
        inner: whether the folder in it of that name is looked through as well.

    Raises:
        ValueError: there is one, which no command made.
    """
    for parent, folders, files in os.walk(folder):
        paths = [Path(parent, name) for name in (*folders, *files)]
        if Path(parent) == folder:
            folders[:] = filter(inner, folders)
        for path in paths:
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(
                    f"{path} is a link, a pipe or a device, which no command makes in such a folder; remove it, or "
                    "choose another folder"
                )


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
    """A folder to fill, which takes its name when everything in it is there.

    Args:
        path: that must not exist, or be an empty folder.

    Raises:
        FileExistsError: it is a link, or exists and is not empty.
        OSError: it cannot be written; nothing of it is left.
    """
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path) as filled:
        yield filled
        # Some libraries write files for their owner only.
        for file in filled.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())
        filled.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        filled.rename(path)


@contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` that no other process fills, removed if something fails.

    Its name is always the same one, so what a killed process left is found and emptied; a living one holds a lock.
    What others put under that name is left alone.
    """
    folder = path.with_name(f".{path.name}.unfinished")
    with suppress(FileExistsError):
        folder.mkdir()
    with _lock(folder) as is_ours:
        if not is_ours:
            raise FileExistsError(f"another process is filling {path}; wait for it, or choose another name")
        try:
            for leftover in folder.iterdir():
                remove(leftover)
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder for itself; however a process ends, the system opens its locks.

    Raises:
        FileExistsError: it is a link, no folder, or of another user.
    """
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or (fcntl is not None and state.st_uid != os.geteuid()):
        raise FileExistsError(f"{folder} is a link, a file or of another user; this command needs the name: remove it")
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield _is_locked(descriptor) and _is_still(folder, descriptor)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    """Whether the lock was free; true on file systems that have none."""
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether the open folder has its name still; another process may have renamed or removed it before the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _umask() -> int:
    """The permissions that new files do not get; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
