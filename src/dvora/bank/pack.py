"""A pack: thousands of saved adapters in one file, written as a stream and read at any place; see `pack_index`.

Equal adapters make equal packs, byte for byte, whatever the order in which they are named.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from ..peft.content import Content
from ..tensors import Float
from ..whole_files import claimed, new_folder
from .pack_index import DTYPES, UNKNOWN, Entry, Index, RowFormat, check_name, checksum, read_index
from .saved import SETTINGS, VALUES, AdapterFiles, described, file_sizes, header_length, told_of
from .sources import AdapterValues, FolderSource, as_bytes, values_in

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OnProgress = Callable[[int, int], object]
"""Called with how many adapters are done, of how many."""


class Rows(Protocol):
    """What makes the rows of adapters for one base; see `factors.FactorRows`."""

    @property
    def key(self) -> str:
        """Of the base, and of what is computed."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a row of factors."""

    @property
    def width(self) -> int:
        """F."""

    @property
    def head_dtype(self) -> torch.dtype:
        """Of a row of heads."""

    @property
    def head_width(self) -> int:
        """H; 0 where nothing is saved whole."""

    def check(self, content: Content) -> None:
        """Refuse an adapter of another base or content with a ValueError."""

    def of(self, values: AdapterValues) -> tuple[Float[Tensor, "F"], Float[Tensor, "H"]]:
        """Both rows of one adapter."""


def write_pack(
    path: Path, folders: Mapping[str, Path], rows: Rows | None = None, on_progress: OnProgress | None = None
) -> None:
    """Write adapters into one file; one of that name is replaced when all is written. One adapter is held at a time.

    Args:
        path: of the pack.
        folders: of the adapters, by the names that they have in the pack.
        rows: makes their rows for a base, so that the first use computes nothing; None: no rows.
        on_progress: see `OnProgress`.

    Raises:
        ValueError: a name cannot be that of a folder; or a folder holds no adapter, a damaged one, or one that the rows
            are not for; or it changes.
        OSError: the file cannot be written; what was there before is there still.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"path: {path} is a folder, a pipe or a device; name a file")
    if not folders:
        raise ValueError("folders: there are no adapters to pack")
    index = _index(folders, rows)
    with claimed(path) as unfinished:
        with (unfinished / "pack").open("wb") as file:
            _write(file, index, folders, rows, on_progress)
            file.flush()
            os.fsync(file.fileno())
        (unfinished / "pack").replace(path)
    unfinished.rmdir()


def unpack(path: Path, output: Path, on_progress: OnProgress | None = None) -> None:
    """Write the adapters of a pack into a new folder: a folder for each, byte for byte what was packed.

    Raises:
        ValueError: the pack is truncated or damaged; nothing is left of the folder.
        FileExistsError: there is something in it.
        OSError: it cannot be written; nothing of it is left.
    """
    with Pack.open(path) as pack, new_folder(output) as filling:
        for number, name in enumerate(pack.names):
            files = pack.source(name).files()
            (filling / name).mkdir()
            (filling / name / SETTINGS).write_bytes(files.settings)
            (filling / name / VALUES).write_bytes(files.values)
            if on_progress is not None:
                on_progress(number + 1, len(pack.names))


class Pack:
    """An open pack, made by `Pack.open`. It stays what it was when another file takes its name.

    It is read where something is asked for, not mapped: mapped pages would count as memory of this process, and a file
    that is cut off while it is mapped ends the process, where this is an error.
    """

    def __init__(self, path: Path, file: BinaryIO, index: Index, start: int) -> None:
        self.path, self.index = path, index
        self.names = tuple(entry.name for entry in index.entries)
        self._places, self._contents = index.places(start), dict[str, Content]()
        self._file, self._lock = file, threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Open a pack and check its index.

        Raises:
            ValueError: it is none, of another version, truncated or damaged.
            OSError: it cannot be read.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not a file; a pack is a file that `dvora bank pack` wrote")
        file = path.open("rb")
        try:
            return cls(path, file, *read_index(path, file))
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its sources cannot be read any longer."""
        with self._lock:
            self._file.close()

    def source(self, name: str) -> PackedSource:
        """One of its adapters.

        Raises:
            KeyError: there is none of that name.
            ValueError: its settings or its header are damaged.
        """
        number = bisect_left(self.names, name)
        if self.names[number : number + 1] != (name,):
            raise KeyError(f"{self.path} has no adapter {name!r}")
        return PackedSource(self, number)

    def content(self, number: int) -> Content:
        """What an adapter consists of, read once for all with the same settings and header.

        Raises:
            ValueError: they are damaged.
        """
        entry, (settings_at, values_at, _, _) = self.index.entries[number], self._places.of(number)
        if (found := self._contents.get(entry.known)) is None:
            length = header_length(self._read(values_at, min(8, entry.values)), entry.values)
            settings, header = self._read(settings_at, entry.settings), self._read(values_at, length)
            if checksum(settings, header) != entry.known:
                raise ValueError("it is damaged: its settings are not those that were packed; pack the adapters again")
            found = self._contents[entry.known] = described(settings, header).content
        return found

    def files(self, number: int) -> AdapterFiles:
        """Both files of an adapter, as they are."""
        entry, (settings_at, values_at, _, _) = self.index.entries[number], self._places.of(number)
        return AdapterFiles(self._read(settings_at, entry.settings), self._read(values_at, entry.values))

    def rows(self, number: int) -> tuple[bytes, bytes]:
        """Both rows of an adapter; empty where the pack has none."""
        _, _, factors, heads = self._places.of(number)
        lengths = (0, 0) if self.index.rows is None else self.index.rows.lengths
        return self._read(factors, lengths[0]), self._read(heads, lengths[1])

    def _read(self, offset: int, length: int) -> bytes:
        with self._lock:
            if self._file.closed:
                raise ValueError(f"{self.path} was closed; open it again with Pack.open")
            self._file.seek(offset)
            found = self._file.read(length)
        if len(found) != length:
            raise ValueError(f"{self.path} was cut off while it was open; pack the adapters again")
        return found


class PackedSource:
    """One adapter of an open pack; at first its settings and its header are read, if those of no other do.

    Args:
        pack: which stays open.
        number: in the order of the names.

    Raises:
        ValueError: they are damaged.
    """

    def __init__(self, pack: Pack, number: int) -> None:
        self.pack, self.number, self._entry = pack, number, pack.index.entries[number]
        with self._told():
            self.content = pack.content(number)

    @property
    def name(self) -> str:
        """In the pack."""
        return self._entry.name

    @property
    def digest(self) -> str:
        """Of its values, which need not be read for it."""
        return self._entry.digest

    def read(self) -> AdapterValues:
        """The values.

        Raises:
            ValueError: they are not those that were packed: the pack is damaged.
        """
        files = self.files()
        with self._told():
            values = values_in(files)
            if values.digest != self.digest:
                raise ValueError("it is damaged: its values have another digest than the index says")
        return values

    def files(self) -> AdapterFiles:
        """The bytes of both files.

        Raises:
            ValueError: see `read`.
        """
        files = self.pack.files(self.number)
        self._check(self._entry.files, *files)
        return files

    def factors(self, key: str) -> tuple[Float[Tensor, "F"], Float[Tensor, "H"]] | None:
        """Its rows of factors and of heads; None if the pack has none of that key.

        Raises:
            ValueError: see `read`.
        """
        rows = self.pack.index.rows
        if rows is None or rows.key != key:
            return None
        factors, heads = self.pack.rows(self.number)
        self._check(self._entry.rows, factors, heads)
        return _tensor(factors, rows.dtype), _tensor(heads, rows.head_dtype)

    def _check(self, expected: str, *parts: bytes) -> None:
        with self._told():
            if checksum(*parts) != expected:
                raise ValueError("it is damaged: its bytes are not those that were packed; pack the adapters again")

    @contextmanager
    def _told(self) -> Iterator[None]:
        with told_of(f"{self.pack.path}: adapter {self._entry.name!r}"):
            yield


def _index(folders: Mapping[str, Path], rows: Rows | None) -> Index:
    """The index of a pack before anything is read: its sizes are known, its checksums are not."""
    entries = []
    for name in sorted(folders):
        check_name(name)
        with told_of(folders[name]):
            entries.append(Entry(name, *file_sizes(folders[name]), *[UNKNOWN] * 4))
    if rows is None:
        return Index(None, tuple(entries))
    dtype, head_dtype = (_NAMES[each] for each in (rows.dtype, rows.head_dtype))
    return Index(RowFormat(rows.key, dtype, rows.width, head_dtype, rows.head_width), tuple(entries))


def _write(
    file: BinaryIO, index: Index, folders: Mapping[str, Path], rows: Rows | None, on_progress: OnProgress | None
) -> None:
    """Write what is in the folders behind a header without checksums, and at last that header with them."""
    places = index.places(file.write(index.header()))
    entries = []
    for number, entry in enumerate(index.entries):
        source = FolderSource(folders[entry.name])
        files = source.files()
        if (len(files.settings), len(files.values)) != (entry.settings, entry.values):
            raise ValueError(f"{source.folder}: it changed while it was packed; pack again when whoever writes is done")
        values = source.values_in(files)
        made = () if rows is None else _rows(rows, values, source.folder)
        for place, part in zip(places.of(number), (*files, *made), strict=False):
            file.seek(place)
            file.write(part)
        known = checksum(files.settings, files.header)
        entries.append(entry._replace(digest=values.digest, known=known, files=checksum(*files), rows=checksum(*made)))
        if on_progress is not None:
            on_progress(number + 1, len(index.entries))
    file.seek(0)
    file.write(index._replace(entries=tuple(entries)).header())


def _rows(rows: Rows, values: AdapterValues, folder: Path) -> tuple[memoryview, memoryview]:
    """Both rows of one adapter as bytes."""
    with told_of(folder):
        rows.check(values.content)
        factors, heads = rows.of(values)
    made = (factors.dtype, *factors.shape, heads.dtype, *heads.shape)
    assert made == (rows.dtype, rows.width, rows.head_dtype, rows.head_width), made
    return as_bytes(factors.cpu()), as_bytes(heads.cpu())


def _tensor(row: bytes, dtype: str) -> Tensor:
    # There is no tensor from a buffer of no bytes.
    return torch.frombuffer(bytearray(row), dtype=DTYPES[dtype]) if row else torch.empty(0, dtype=DTYPES[dtype])
