"""The files behind a server's adapters: what it was given, what clients uploaded, and an index that survives a kill.

Beside the given folder or pack stands `.served` with a folder for each upload and `index.json`: for every name that a
client loaded where its adapter is, for every name that one deleted null. An upload is written before the index names
it, and the index is replaced in one step, so a killed server starts again with either the old adapter or the new one.

Files are one server's, or shared by several: then the index is what they tell each other by. Each changes it while it
holds a lock, and the others read it again before their next request (see `Registry.follow`).
"""

from __future__ import annotations

import json
import os
import secrets
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors.torch import save
from torch import Tensor

from ..bank.adapters import SETTINGS, VALUES, Description, FolderSource, adapters_in, folder_of
from ..bank.packs import Pack
from ..recipes.files import read_json
from ..recipes.run_folder import RECORD, checked_labels
from ..whole_files import new_folder, remove, write_atomically
from .requests import RefusedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INDEX, LARGEST_INDEX = "index.json", 2**26
ABSENT = object()
CHANGING_SECONDS = 30.0
"""For which a change waits for those of other servers."""
LINGERING_SECONDS = 3600.0
"""For which a replaced upload stays where servers share the files: requests to other ones may still read it."""


@dataclass(frozen=True)
class Entry:
    """What the index says of a name.

    Args:
        folder: of the adapter, relative to the root.
        labels: names of the classes.
        is_upload: whether the folder came with a request.
        digest: of the content, so that a folder whose files were replaced is another entry.
    """

    folder: str
    labels: tuple[str, ...]
    is_upload: bool
    digest: str


class Store:
    """The files of a server.

    Args:
        source: a folder of adapters or runs, which may be empty, or a pack.
        is_shared: whether other servers have the same files, each of them sharing them.

    Raises:
        ValueError: it is neither, another server has it for itself, or its index is damaged.
    """

    def __init__(self, source: Path, is_shared: bool = False) -> None:
        if not source.exists():
            raise ValueError(f"--adapters {source}: there is no such file or folder; make the folder if it is new")
        self.pack = None if source.is_dir() else source
        self.root = source if source.is_dir() else source.parent
        self.folder = source / ".served" if source.is_dir() else source.with_name(f".{source.name}.served")
        self.folder.mkdir(exist_ok=True)
        self.is_shared = is_shared
        self._held = ExitStack()
        lock = self.folder / "lock"
        if not (_shared_lock(lock, self._held) if is_shared else _lock(lock, self._held)):
            raise ValueError(f"--adapters {source}: another server has it; stop that one, or copy the folder")
        self._changes = filelock.FileLock(self.folder / "changes", timeout=CHANGING_SECONDS, thread_local=False)
        self.index, self._last_read = self._read_index()

    def close(self) -> None:
        """Let other servers have the files."""
        self._held.close()

    def names(self) -> list[str]:
        """Of the adapters that were given, and of those that clients loaded."""
        given = list(Pack.open(self.pack).entries) if self.pack is not None else list(self.given_folders())
        return given + [name for name, entry in self.index.items() if entry is not None]

    def given_folders(self) -> dict[str, Path]:
        """The folders of adapters in the root, by name; none if it is empty."""
        return adapters_in(self.root) if any(path.name[0] != "." for path in self.root.iterdir()) else {}

    def labels_of(self, name: str) -> tuple[str, ...]:
        """Names of the classes of an adapter that was given as a run of `dvora train`."""
        record = self.root / name / RECORD
        if self.pack is not None or not record.is_file():
            return ()
        return checked_labels(read_json(record).get("labels") or [], record)

    def below(self, path: str) -> Path:
        """A folder that a client names, in the root.

        Raises:
            RefusedError: 400, it leads elsewhere; 404, it is not there.
        """
        folder = (self.root / path).resolve()
        if not folder.is_relative_to(self.root.resolve()) or self.folder.resolve() in (folder, *folder.parents):
            raise RefusedError(400, "lora_path leads out of the folder of adapters; name one in it", "InvalidUserInput")
        folder = folder_of(folder)
        if not (folder / SETTINGS).is_file():
            raise RefusedError(404, f"lora_path: there is no adapter in {path[:200]!r}", "NotFoundError")
        return folder

    def description_of(self, name: str | None = None) -> Description | None:
        """Settings, names and shapes of an adapter, or of any other if there is none of that name."""
        loaded = {other: self.root / entry.folder for other, entry in self.index.items() if entry is not None}
        if self.pack is not None and name not in loaded:
            with Pack.open(self.pack) as pack:
                return pack.source(name if name and name in pack.entries else next(iter(pack.entries))).description
        folders = {**({} if self.pack is not None else self.given_folders()), **loaded}
        folder = folders.get(name or "", next(iter(folders.values()), None))
        return None if folder is None else FolderSource(folder).description

    def write(self, content: Mapping[str, bytes]) -> Path:
        """Write an upload into a folder of its own.

        Args:
            content: of the files in it, by name.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        folder = self.folder / secrets.token_hex(8)
        with new_folder(folder) as filling:
            for name, data in content.items():
                (filling / name).write_bytes(data)
        return folder

    def keep(self, name: str, folder: Path, labels: tuple[str, ...], is_upload: bool, digest: str) -> None:
        """Serve an adapter after a restart too."""
        relative = folder.resolve().relative_to(self.root.resolve()).as_posix()
        self._write_index({**self.index, name: Entry(relative, labels, is_upload, digest)})
        if self.is_shared:
            self.sweep()

    def forget(self, name: str) -> None:
        """Serve an adapter no longer after a restart; of what was given the files stay."""
        given = self.pack is not None and name in Pack.open(self.pack).entries
        given = given or (self.pack is None and name in self.given_folders())
        index = {other: entry for other, entry in self.index.items() if other != name}
        self._write_index({**index, name: None} if given else index)

    def sweep(self) -> None:
        """Remove uploads that the index does not name, as a killed server leaves them; of shared ones only old ones."""
        used = {(self.root / entry.folder).resolve() for entry in self.index.values() if entry is not None}
        unused = [path for path in self.folder.iterdir() if path.is_dir() and path.resolve() not in used]
        for path in unused:
            # What another server is writing takes its own name at any moment.
            with suppress(FileNotFoundError):
                if not self.is_shared or path.stat().st_mtime < time.time() - LINGERING_SECONDS:
                    remove(path)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While the index is changed: of servers that share it one after another, each from what the last one left.

        Raises:
            RefusedError: 503, others change it all the time.
        """
        with ExitStack() as held:
            if self.is_shared:
                try:
                    held.enter_context(self._changes)
                except filelock.Timeout:
                    raise RefusedError(503, "other servers change the adapters; try again", "unavailable") from None
            yield

    def is_behind(self) -> bool:
        """Whether another server changed the index since it was last read here."""
        if not self.is_shared:
            return False
        try:
            state = (self.folder / INDEX).stat()
        except FileNotFoundError:
            return False
        return self._last_read is None or not os.path.samestat(state, self._last_read.state)

    @contextmanager
    def catching_up(self) -> Iterator[dict[str, Entry | None]]:
        """The entries that others changed, None where nothing is served any more.

        Until they are taken over, and also after an error, `is_behind` is true.
        """
        (index, read), before = self._read_index(), self.index
        names = [name for name in {**before, **index} if index.get(name, ABSENT) != before.get(name, ABSENT)]
        yield {name: index.get(name) for name in names}
        self.index, self._last_read = index, read

    def _read_index(self) -> tuple[dict[str, Entry | None], _ReadFile | None]:
        """The index, and the file it was read from or an older one."""
        file = self.folder / INDEX
        if not file.is_file():
            return {}, None
        read = _ReadFile(file) if self.is_shared else None
        try:
            saved = read_json(file, LARGEST_INDEX)
            index = {
                name: None if entry is None else Entry(**{**entry, "labels": tuple(entry["labels"])})
                for name, entry in saved.items()
            }
            return index, read
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"{file} is damaged ({error!r:.200}); remove it to start with the given adapters"
            ) from error

    def _write_index(self, index: dict[str, Entry | None]) -> None:
        saved: dict[str, Any] = {name: None if entry is None else asdict(entry) for name, entry in index.items()}
        for name, entry in self.index.items():
            if self.is_shared and entry is not None and entry.is_upload and index.get(name) != entry:
                # From now on it lingers.
                with suppress(FileNotFoundError):
                    os.utime(self.root / entry.folder)
        write_atomically(self.folder / INDEX, json.dumps(saved).encode())
        self.index = index


class _ReadFile:
    """A file that was read; it stays open, so that the disk gives its number to no later file of its name."""

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self.state = os.fstat(descriptor)


def _lock(file: Path, held: ExitStack) -> bool:
    """Hold a lock that nobody else has."""
    try:
        held.enter_context(filelock.FileLock(file, timeout=0, thread_local=False))
    except filelock.Timeout:
        return False
    return True


def _shared_lock(file: Path, held: ExitStack) -> bool:
    """Hold a lock that others have who share it, and nobody for himself; filelock has no such lock without SQLite."""
    if fcntl is None:
        raise ValueError("servers share adapters on systems with fcntl only, which this one has not; use one server")
    opened = held.enter_context(file.open("ab"))
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return False
    return True


def files_of_vector(vector: Tensor, like: Description) -> dict[str, bytes]:
    """The files of an adapter whose values are a flat vector, with the settings of another one.

    Args:
        vector: float32, in the order of `dvora.flat.Layout`, (S,).
        like: of the same layers and heads.

    Raises:
        ValueError: it is of another length.
    """
    shapes = {key: like.entries[key][1] for key in like.names.values()}
    lengths = [prod(shape) for shape in shapes.values()]
    if vector.shape != (sum(lengths),):
        raise ValueError(
            f"the vector has {len(vector):,} values, expected {sum(lengths):,}; was its layout another one?"
        )
    parts = vector.split(lengths)
    tensors = {key: part.view(shape).clone() for (key, shape), part in zip(shapes.items(), parts, strict=True)}
    return {SETTINGS: like.settings, VALUES: save(tensors, metadata={"format": "pt"})}


def files_of_upload(data: bytes, like: Description | None) -> dict[str, bytes]:
    """The files of an adapter from one file: an adapter_model.safetensors, with the settings of another one.

    Raises:
        ValueError: there is no other one to take the settings of.
    """
    if like is None:
        raise ValueError("there is no adapter yet whose settings a file of values could have; put a folder there first")
    return {SETTINGS: like.settings, VALUES: data}


def vector_of(data: bytes) -> Tensor:
    """The values of a flat vector that was sent as little-endian float32.

    Raises:
        ValueError: its bytes are no multiple of four.
    """
    if len(data) % 4 or not data:
        raise ValueError(f"a flat vector is float32, so a multiple of four bytes; got {len(data):,}")
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
