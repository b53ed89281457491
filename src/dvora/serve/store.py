"""The files behind a server's adapters: what it was given, what clients uploaded, and an index that survives a kill.

Beside the given folder or pack stands `.served` with a folder for each upload and `index.json`: for every name that a
client loaded where its adapter is, for every name that one deleted null. An upload is on the disk before the index
names it, and the index is replaced in one step, so a killed server starts again with either the old adapter or the new
one. What stands there may come from a stranger with the folder: nothing is followed, read or removed by a name that a
server could not have given.

Files are one server's, or shared by several: then they follow each other by the index. Each changes it while it
holds a lock, and the others read it again before their next request (see `Registry.follow`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from errno import EFBIG
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ..adapter_file.packs import Pack, PackedSource
from ..adapter_file.values import IN_RUN, Description, FolderSource, adapters_in, folder_of
from ..adapter_file.values_file import SETTINGS, VALUES
from ..bank import Version
from ..bank.bank import MORE_ROOM, PARTIAL
from ..recipes.files import check_no_links, read_json
from ..recipes.models.adapters import Adapter
from ..recipes.run_folder import RECORD, checked_labels
from ..whole_files import RANDOM, locked, new_folder, remove, write_atomically
from .requests import RefusedError

INDEX, LARGEST_INDEX = "index.json", 2**26
UPLOAD = re.compile(r"[0-9a-f]{16}")
"""What the folders of uploads are called."""
UNFINISHED = re.compile(rf"\.([0-9a-f]{{16}}\.unfinished|index\.json\.{RANDOM})")
"""What a server leaves that is killed while it writes."""
LONGEST_REASON = 1000
"""Letters of an error; some quote what is damaged."""
CHANGING_SECONDS = 30.0
"""For which a change waits for those of other servers."""
UNUSED_SECONDS = 3600.0
"""For which an upload stays that a server uses no longer, where others share the files: their requests may read it."""


@dataclass(frozen=True)
class Entry:
    """What the index says of a name: a folder relative to the root, which may have come with a request.

    The digest is of the content, so that a folder whose files were replaced is another entry.
    """

    folder: str
    labels: tuple[str, ...]
    is_upload: bool
    digest: str


@dataclass(eq=False)
class Served(Version):
    """A version of the bank with what a server knows of it."""

    allow_unchanged: bool = True
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the head's outputs; empty where nobody said."""
    upload: Path | None = None
    """The folder that a request made; None for what was there before."""
    put_as: str | None = None
    """The digest with which an earlier process put it."""
    discard: Callable[[Path], None] | None = None
    """What becomes of the upload when nobody uses it any more."""

    def ended(self) -> None:
        """Discard the upload."""
        if self.upload is not None and self.discard is not None:
            self.discard(self.upload)

    @property
    def description(self) -> Description:
        """Its settings, names and shapes."""
        assert isinstance(self.source, FolderSource | PackedSource)
        return self.source.description

    @property
    def adapter(self) -> Adapter:
        """It as the recipes know adapters; a ValueError, if it lacks the head that its settings name."""
        shapes = {name: shape for name, (_, shape) in self.description.entries.items()}
        return Adapter(Path(), json.loads(self.description.settings), shapes, ())


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
        # So that `public` finds it in messages.
        source = source.absolute()
        self.pack = None if source.is_dir() else source
        self.root = source if source.is_dir() else source.parent
        self.folder = source / ".served" if source.is_dir() else source.with_name(f".{source.name}.served")
        for path in (self.folder, *(self.folder / name for name in ("lock", "changes", INDEX))):
            if path.is_symlink() or (path != self.folder and path.exists() and not path.is_file()):
                raise ValueError(f"--adapters {source}: {path} is no plain file, and no server made it; remove it")
        self.folder.mkdir(exist_ok=True)
        self.is_shared, self._held = is_shared, ExitStack()
        busy = ValueError(f"--adapters {source}: another server has it; stop that one, or copy the folder")
        self._held.enter_context(locked(self.folder / "lock", is_shared=is_shared, busy=busy))
        self.index, self._read_at = self._read_index()

    def close(self) -> None:
        """Let other servers have the files."""
        self._held.close()

    def open(self) -> tuple[list[Served], dict[str, str]]:
        """All adapters whose settings and names can be read, and why others cannot, by name.

        The first ones say which layers are served, so those of the most frequent kind come first.
        """
        opened, damaged = list[Served](), dict[str, str]()
        sources = {name: read for name, read in self.given().items() if name not in self.index}
        sources |= {name: partial(self.indexed, name, entry) for name, entry in self.index.items() if entry is not None}
        for name, read in sources.items():
            try:
                # Names of folders need not be UTF-8, and the error is a ValueError.
                name.encode()
                opened.append(read())
            except (ValueError, TypeError, OSError, RuntimeError, RefusedError) as error:
                # Python before 3.13 calls a loop of links a RuntimeError.
                damaged[name.encode(errors="replace").decode()] = self.public(error)
        frequency = Counter(map(_kind, opened))
        return sorted(opened, key=lambda version: -frequency[_kind(version)]), damaged

    def given(self) -> dict[str, Callable[[], Served]]:
        """What the server was given, by name; the functions read it. A ValueError, if the pack is none."""
        if self.pack is not None:
            pack = Pack.open(self.pack)
            return {name: partial(_packed, pack, name) for name in pack.entries}
        is_empty = all(path.name[0] == "." for path in self.root.iterdir())
        folders = {} if is_empty else adapters_in(self.root)
        return {name: partial(self.given_in, name, folder) for name, folder in folders.items()}

    def given_in(self, name: str, folder: Path) -> Served:
        """An adapter in a folder that the server was given; where that is in a run, with the names of its classes."""
        record, root = folder.parent / RECORD, self.root.resolve()
        has_record = folder.name == IN_RUN and record.is_file()
        for path in (folder, folder / SETTINGS, folder / VALUES, *([record] if has_record else [])):
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path.name} is a link that leads out of the folder of adapters; copy what is there")
        labels = checked_labels(read_json(record).get("labels") or [], record) if has_record else ()
        # Half a letter of two, which JSON can have and no answer: an error that is a ValueError.
        "".join(labels).encode()
        return Served(name, FolderSource(folder), labels=labels)

    def indexed(self, name: str, entry: Entry) -> Served:
        """What the index names; a ValueError or a refusal, if it is damaged or no server can have written it there."""
        "".join(entry.labels).encode()
        if not entry.is_upload:
            version = self.given_in(name, self.below(entry.folder))
            version.labels, version.put_as = entry.labels, entry.digest
            return version
        parent, _, last = entry.folder.rpartition("/")
        folder = self.folder / last
        if parent != self.folder.name or not UPLOAD.fullmatch(last) or folder.is_symlink():
            raise ValueError("the index names a folder that no upload made")
        check_no_links(folder, lambda _: False)
        return Served(name, FolderSource(folder), labels=entry.labels, upload=folder, put_as=entry.digest)

    def below(self, path: str) -> Path:
        """A folder of an adapter in the root, by a path from outside: 400 if it leads elsewhere, 404 without one."""
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

    def public(self, error: BaseException) -> str:
        """What clients may read of an error: without the server's paths, and without letters that no JSON has."""
        message = error.message if isinstance(error, RefusedError) else str(error)
        message = message.encode(errors="replace").decode().replace(PARTIAL, "")
        message = message.replace(MORE_ROOM, "start the server with more --head-memory or fewer --slots")
        for path in (self.folder, self.root):
            message = re.sub(rf"{re.escape(str(path))}[^:\s]*(: )?", "", message)
        return message[:LONGEST_REASON]

    def write(self, files: Mapping[str, bytes]) -> Path:
        """Write the files of an upload into a folder of its own; after an OSError nothing of it is left."""
        folder = self.folder / secrets.token_hex(8)
        with new_folder(folder) as filling:
            for name, data in files.items():
                (filling / name).write_bytes(data)
        return folder

    def discard(self, upload: Path) -> None:
        """Remove an upload that nobody uses here any more; what others share is swept when it was long unused."""
        with suppress(OSError):
            if self.is_shared:
                os.utime(upload)
            else:
                remove(upload)

    def keep(self, version: Served) -> None:
        """Serve an adapter after a restart too: on the disk when this returns. After an OSError all is as it was."""
        assert isinstance(version.source, FolderSource)
        folder = version.source.folder.resolve().relative_to(self.root.resolve()).as_posix()
        entry = Entry(folder, version.labels, version.upload is not None, str(version.digest))
        self._write_index({**self.index, version.name: entry})

    def forget(self, name: str) -> None:
        """Serve an adapter no longer after a restart; of what was given the files stay. Errors are those of `keep`."""
        index = {other: entry for other, entry in self.index.items() if other != name}
        # Folders that were loaded may be gone, and all of them with that.
        with suppress(ValueError):
            if name in self.given():
                index[name] = None
        self._write_index(index)

    def sweep(self) -> None:
        """Remove what killed servers left: uploads that the index does not name, and half of one; shared ones later."""
        used = {self.root / entry.folder for entry in self.index.values() if entry is not None}
        for path in self.folder.iterdir():
            if not (UNFINISHED.fullmatch(path.name) or (UPLOAD.fullmatch(path.name) and path not in used)):
                continue
            # What another server is writing takes its own name at any moment.
            with suppress(OSError):
                if not self.is_shared or path.lstat().st_mtime < time.time() - UNUSED_SECONDS:
                    remove(path)

    def changing(self) -> AbstractContextManager[None]:
        """While the index is changed: of servers that share it one after another, or 503 if others do all the time."""
        busy = RefusedError(503, "other servers change the adapters; try again", "unavailable")
        return locked(self.folder / "changes", CHANGING_SECONDS, busy=busy) if self.is_shared else nullcontext()

    @property
    def is_stale(self) -> bool:
        """Whether another server changed the index since it was last read here."""
        return self.is_shared and self._written_at() != self._read_at

    @contextmanager
    def refreshing(self) -> Iterator[dict[str, Entry | None]]:
        """The entries that others changed, None where nothing is served any more. After an error it is stale still."""
        index, read_at = self._read_index()
        yield {name: index.get(name) for name, _ in index.items() ^ self.index.items()}
        self.index, self._read_at = index, read_at

    def _written_at(self) -> int:
        """When the index was written: nanoseconds, later ones for each one after another; 0 if there is none."""
        try:
            return (self.folder / INDEX).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _read_index(self) -> tuple[dict[str, Entry | None], int]:
        """The index, and when it or one before it was written."""
        file, written_at = self.folder / INDEX, self._written_at()
        try:
            return (_Index.validate_python(read_json(file, LARGEST_INDEX)) if written_at else {}), written_at
        except ValidationError as error:
            raise ValueError(
                f"{file} is damaged ({str(error)[:200]}); remove it to start with the given adapters"
            ) from error

    def _write_index(self, index: dict[str, Entry | None]) -> None:
        if len(content := _Index.dump_json(index)) > LARGEST_INDEX:
            raise OSError(EFBIG, f"the index would be larger than {LARGEST_INDEX:,} bytes; delete some adapters")
        file = self.folder / INDEX
        before = file.read_bytes() if file.exists() else None
        try:
            written_at = max(time.time_ns(), self._written_at() + 10**6)
            write_atomically(file, content)
            # Two within one tick of the disk's clock would look alike.
            os.utime(file, ns=(written_at, written_at))
        except OSError:
            # It may be in place already, and not on the disk for sure.
            with suppress(OSError):
                file.unlink(missing_ok=True) if before is None else write_atomically(file, before)
            raise
        self.index, self._read_at = index, self._written_at()


_Index = TypeAdapter(dict[str, Entry | None])


def _packed(pack: Pack, name: str) -> Served:
    return Served(name, pack.source(name))


def _kind(version: Served) -> tuple[object, ...]:
    """What adapters of one bank and one class of the base have in common."""
    config, content = version.description.config, version.description.content
    return content.settings, content.layers, config.task_type, json.dumps(config.auto_mapping)
