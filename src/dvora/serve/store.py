"""The files behind a server's adapters: what it was given, what clients uploaded, and an index that survives a kill.

Beside the given folder or pack stands `.served` with a folder for each upload and `index.json`: for every name that a
client loaded where its adapter is, for every name that one deleted null. An upload is on the disk before the index
names it, and the index is replaced in one step, so a killed server starts again with either the old adapter or the new
one. What stands there may come from a stranger with the folder: nothing is followed, read or removed by a name that a
server could not have given.

Files are one server's, or shared by several: then the index is what they tell each other by. Each changes it while it
holds a lock, and the others read it again before their next request (see `Registry.follow`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
from pydantic import TypeAdapter, ValidationError

from ..adapter_file.packs import Pack, PackedSource
from ..adapter_file.values import IN_RUN, FolderSource, adapters_in, folder_of
from ..adapter_file.values_file import SETTINGS, VALUES
from ..recipes.files import check_no_links, read_json
from ..recipes.models.adapters import Adapter
from ..recipes.run_folder import RECORD, checked_labels
from ..whole_files import RANDOM, new_folder, remove, write_atomically
from .requests import RefusedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

INDEX, LARGEST_INDEX = "index.json", 2**26
UPLOAD = re.compile(r"[0-9a-f]{16}")
"""What the folders of uploads are called."""
UNFINISHED = re.compile(rf"\.([0-9a-f]{{16}}\.unfinished|index\.json\.{RANDOM})")
"""What a server leaves that is killed while it writes."""
LONGEST_REASON = 1000
"""Letters of an error; some quote what is damaged."""
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


class Stored(NamedTuple):
    """An adapter on the disk."""

    source: FolderSource | PackedSource
    labels: tuple[str, ...] = ()
    """Names of the classes, where somebody said them."""
    upload: Path | None = None
    """The folder that an upload made; None for what was there before."""
    digest: str | None = None
    """Of its content when it was put, in this process or an earlier one."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What adapters of one bank and one class of the base have in common."""
        config, content = self.source.description.config, self.source.description.content
        return content.settings, content.layers, config.task_type, json.dumps(config.auto_mapping)

    @property
    def adapter(self) -> Adapter:
        """It as the recipes know adapters, for the class of its base and the outputs of its head.

        Raises:
            ValueError: it lacks the head that its settings name.
        """
        description = self.source.description
        shapes = {name: shape for name, (_, shape) in description.entries.items()}
        return Adapter(Path(), json.loads(description.settings), shapes, ())


class Store:
    """The files of a server.

    Args:
        source: a folder of adapters or runs, which may be empty, or a pack.
        is_shared: whether other servers have the same files, each of them sharing them.

    Raises:
        ValueError: it is neither, another server has it for itself, or its index is damaged or a link.
    """

    def __init__(self, source: Path, is_shared: bool = False) -> None:
        if not source.exists():
            raise ValueError(f"--adapters {source}: there is no such file or folder; make the folder if it is new")
        # So that `told` finds it in messages.
        source = source.absolute()
        self.pack = None if source.is_dir() else source
        self.root = source if source.is_dir() else source.parent
        self.folder = source / ".served" if source.is_dir() else source.with_name(f".{source.name}.served")
        lock, changes = self.folder / "lock", self.folder / "changes"
        for path in (self.folder, lock, changes, self.folder / INDEX):
            if path.is_symlink() or (path != self.folder and path.exists() and not path.is_file()):
                raise ValueError(f"--adapters {source}: {path} is no plain file, and no server made it; remove it")
        self.folder.mkdir(exist_ok=True)
        self.is_shared = is_shared
        self._held = ExitStack()
        if not _is_locked(lock, is_shared, self._held):
            raise ValueError(f"--adapters {source}: another server has it; stop that one, or copy the folder")
        self._changes = filelock.FileLock(changes, timeout=CHANGING_SECONDS, thread_local=False)
        self.index, self._last_read = self._read_index()

    def close(self) -> None:
        """Let other servers have the files."""
        self._held.close()

    def open(self) -> tuple[dict[str, Stored], dict[str, str]]:
        """All adapters whose settings and names can be read, and why others cannot.

        The first one says which layers are served, so those of the most frequent kind come first.

        Raises:
            ValueError: the pack is none.
        """
        opened: dict[str, Stored] = {}
        damaged: dict[str, str] = {}
        given = {name: read for name, read in self.given().items() if name not in self.index}
        entries = {name: partial(self.stored, entry) for name, entry in self.index.items() if entry is not None}
        reads: dict[str, Callable[[], Stored]] = {**given, **entries}
        for name, read in reads.items():
            try:
                # Names of folders need not be UTF-8, and the error is a ValueError.
                name.encode()
                opened[name] = read()
            except (ValueError, TypeError, OSError, RuntimeError, RefusedError) as error:
                # Python before 3.13 calls a loop of links a RuntimeError.
                damaged[name.encode(errors="replace").decode()] = self.told(error)
        frequency = Counter(stored.kind for stored in opened.values())
        return dict(sorted(opened.items(), key=lambda item: -frequency[item[1].kind])), damaged

    def given(self) -> dict[str, Callable[[], Stored]]:
        """What the server was given, by name; the functions read it."""
        if self.pack is not None:
            pack = Pack.open(self.pack)

            def packed(name: str) -> Stored:
                return Stored(pack.source(name))

            return {name: partial(packed, name) for name in pack.entries}
        is_empty = all(path.name[0] == "." for path in self.root.iterdir())
        folders = {} if is_empty else adapters_in(self.root)
        return {name: partial(self.given_in, folder) for name, folder in folders.items()}

    def given_in(self, folder: Path) -> Stored:
        """An adapter in a folder that the server was given; where that is in a run, with the names of its classes.

        Raises:
            ValueError: it is damaged, or a link leads out of what the server was given.
        """
        record, root = folder.parent / RECORD, self.root.resolve()
        has_record = folder.name == IN_RUN and record.is_file()
        for path in (folder, folder / SETTINGS, folder / VALUES, *([record] if has_record else [])):
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path.name} is a link that leads out of the folder of adapters; copy what is there")
        labels = checked_labels(read_json(record).get("labels") or [], record) if has_record else ()
        # Half a letter of two, which JSON can have and no answer: an error that is a ValueError.
        "".join(labels).encode()
        return Stored(FolderSource(folder), labels)

    def stored(self, entry: Entry) -> Stored:
        """What the index names.

        Raises:
            ValueError, RefusedError: it is damaged, not there, or no server can have written it there.
        """
        "".join(entry.labels).encode()
        if not entry.is_upload:
            return self.given_in(self.below(entry.folder))._replace(labels=entry.labels, digest=entry.digest)
        parent, _, name = entry.folder.rpartition("/")
        folder = self.folder / name
        if parent != self.folder.name or not UPLOAD.fullmatch(name) or folder.is_symlink():
            raise ValueError("the index names a folder that no upload made")
        check_no_links(folder, lambda _: False)
        return Stored(FolderSource(folder), entry.labels, folder, entry.digest)

    def below(self, path: str) -> Path:
        """A folder of an adapter in the root, by a name from outside.

        Raises:
            RefusedError: 400, it leads elsewhere; 404, there is no adapter.
        """
        try:
            folder = (self.root / path).resolve()
            if not folder.is_relative_to(self.root.resolve()) or self.folder.resolve() in (folder, *folder.parents):
                message = f"the path {path[:200]!r} leads out of the folder of adapters; name one in it"
                raise RefusedError(400, message, "InvalidUserInput")
            folder = folder_of(folder)
            if not (folder / SETTINGS).is_file():
                raise RefusedError(404, f"there is no adapter in {path[:200]!r}", "NotFoundError")
        except (ValueError, OSError, RuntimeError) as error:
            # One with a NUL, too long for the system, or a loop of links.
            raise RefusedError(400, f"{path[:200]!r} is no path", "InvalidUserInput") from error
        return folder

    def told(self, error: BaseException) -> str:
        """What clients may read of an error: without the server's paths, and without letters that no JSON has."""
        message = error.message if isinstance(error, RefusedError) else str(error)
        message = message.encode(errors="replace").decode()
        for path in (self.folder, self.root):
            message = re.sub(rf"{re.escape(str(path))}[^:\s]*(: )?", "", message)
        return message[:LONGEST_REASON]

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

    def keep(self, name: str, stored: Stored, digest: str) -> None:
        """Serve an adapter after a restart too; it is on the disk when this returns.

        Raises:
            OSError: the index cannot be written, and is as it was.
        """
        assert isinstance(stored.source, FolderSource)
        folder = stored.source.folder.resolve().relative_to(self.root.resolve()).as_posix()
        self._write_index({**self.index, name: Entry(folder, stored.labels, stored.upload is not None, digest)})
        if self.is_shared:
            self.sweep()

    def forget(self, name: str) -> None:
        """Serve an adapter no longer after a restart; of what was given the files stay.

        Raises:
            OSError: the index cannot be written, and is as it was.
        """
        index = {other: entry for other, entry in self.index.items() if other != name}
        try:
            is_given = name in self.given()
        except ValueError:
            # Folders that were loaded may be gone, and all of them with that.
            is_given = False
        self._write_index({**index, name: None} if is_given else index)

    def sweep(self) -> None:
        """Remove what killed servers left: uploads that the index does not name, and half of one; shared ones later."""
        used = {self.root / entry.folder for entry in self.index.values() if entry is not None}
        for path in self.folder.iterdir():
            if not (UNFINISHED.fullmatch(path.name) or (UPLOAD.fullmatch(path.name) and path not in used)):
                continue
            # What another server is writing takes its own name at any moment.
            with suppress(FileNotFoundError):
                if not self.is_shared or path.lstat().st_mtime < time.time() - LINGERING_SECONDS:
                    remove(path)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While the index is changed: of servers that share it one after another, each from what the last one left.

        Raises:
            RefusedError: 503, others change it all the time.
        """
        try:
            with self._changes if self.is_shared else nullcontext():
                yield
        except filelock.Timeout:
            raise RefusedError(503, "other servers change the adapters; try again", "unavailable") from None

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
        yield {name: index.get(name) for name, _ in index.items() ^ before.items()}
        self.index, self._last_read = index, read

    def _read_index(self) -> tuple[dict[str, Entry | None], _ReadFile | None]:
        """The index, and the file it was read from or an older one."""
        file = self.folder / INDEX
        if not file.is_file():
            return {}, None
        read = _ReadFile(file) if self.is_shared else None
        try:
            return _Index.validate_python(read_json(file, LARGEST_INDEX)), read
        except ValidationError as error:
            raise ValueError(
                f"{file} is damaged ({str(error)[:200]}); remove it to start with the given adapters"
            ) from error

    def _write_index(self, index: dict[str, Entry | None]) -> None:
        for name, entry in self.index.items():
            if self.is_shared and entry is not None and entry.is_upload and index.get(name) != entry:
                # From now on it lingers.
                with suppress(FileNotFoundError):
                    os.utime(self.root / entry.folder)
        if len(content := _Index.dump_json(index)) > LARGEST_INDEX:
            raise ValueError(f"the index of all adapters would be larger than {LARGEST_INDEX:,} bytes; delete some")
        file = self.folder / INDEX
        before = file.read_bytes() if file.exists() else None
        try:
            write_atomically(file, content)
        except OSError:
            # It may be in place already, and not on the disk for sure.
            with suppress(OSError):
                file.unlink(missing_ok=True) if before is None else write_atomically(file, before)
            raise
        self.index = index


_Index = TypeAdapter(dict[str, Entry | None])


class _ReadFile:
    """A file that was read; it stays open, so that the disk gives its number to no later file of its name."""

    def __init__(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self.state = os.fstat(descriptor)


def _is_locked(file: Path, is_shared: bool, held: ExitStack) -> bool:
    """Hold a lock that nobody else has, or one that others have who share it, if it is free."""
    try:
        if not is_shared:
            held.enter_context(filelock.FileLock(file, timeout=0, thread_local=False))
        elif fcntl is None:
            message = "servers share adapters on systems with fcntl only, which this one has not; use one server"
            raise ValueError(message)
        else:
            # filelock has no such lock without SQLite.
            fcntl.flock(held.enter_context(file.open("ab")), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (filelock.Timeout, BlockingIOError):
        held.close()
        return False
    return True
