"""A pack: thousands of saved adapters in one safetensors file, written as a stream and read at any place.

| tensor | what |
|---|---|
| `.settings.0`, ... | bytes of an `adapter_config.json`; equal ones once |
| `.header.0`, ... | the header of an `adapter_model.safetensors`; equal ones once |
| the name of an adapter | the data behind that header: all its values, in one tensor |

The metadata says which settings, which header and which digest of both files an adapter has. A digest tells damage;
what is served under a name follows from the values alone. Equal adapters make equal packs, byte for byte,
whatever the order in which they are named.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import unicodedata
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from ..whole_files import claimed, new_folder
from .content import Content
from .settings import DVoRAConfig
from .values import AdapterValues, Description, FolderSource, described, errors_of, values_of
from .values_file import LARGEST_HEADER, LARGEST_SETTINGS, SETTINGS, VALUES, Shape

FORMAT = "dvora pack 2"
LARGEST_INDEX = 2**25
"""Bytes of a pack's header: those of about 200,000 adapters."""
_RESERVED = re.compile(r"((con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])(\..*)?|__metadata__)", re.IGNORECASE)
"""Names that Windows has for devices, and safetensors for what is no tensor."""
OnProgress = Callable[[int, int], object]
"""Called with how many adapters are done, of how many."""


class Entry(NamedTuple):
    """What the index says of an adapter."""

    settings: int
    header: int
    digest: str


class Pack:
    """An open pack, made by `Pack.open`. It stays what it was when another file takes its name.

    It is read where something is asked for, not mapped: mapped pages would count as memory of this process, and a file
    that is cut off while it is mapped ends the process. The file is closed with the last source.
    """

    def __init__(
        self, path: object, descriptor: int, places: Mapping[str, range], entries: Mapping[str, Entry]
    ) -> None:
        self.path, self.entries = path, entries
        self._places, self._lock = places, threading.Lock()
        self._descriptions: dict[tuple[int, int], Description] = {}
        self._descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Close the file; its sources cannot be read any longer."""

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Open a pack and check its index.

        Raises:
            ValueError: it is none, of another version, truncated or damaged.
            OSError: it cannot be read.
        """
        if not path.is_file():
            raise ValueError(f"{path} is not a file; a pack is a file that `dvora bank pack` wrote")
        with path.open("rb") as file:
            return cls.of(file, path)

    @classmethod
    def of(cls, file: BinaryIO, path: object, largest_header: int = LARGEST_HEADER) -> Pack:
        """The pack in an open file, which may be closed then.

        Args:
            file: at its beginning.
            path: what errors call it.
            largest_header: bytes of the settings and of the header of an adapter, and of the index, at most.

        Raises:
            ValueError: as for `open`.
        """
        with errors_of(path):
            places, entries = _read_index(file, largest_header)
            return cls(path, os.dup(file.fileno()), places, entries)

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def source(self, name: str) -> PackedSource:
        """One of its adapters.

        Raises:
            KeyError: there is none of that name.
            ValueError: its settings or its header are damaged.
        """
        entry = self.entries[name]
        with errors_of(f"{self.path}: adapter {name!r}"):
            kind = entry.settings, entry.header
            if kind not in self._descriptions:
                settings, header = self.read(f".settings.{entry.settings}"), self.read(f".header.{entry.header}")
                self._descriptions[kind] = described(settings, header)
            description = self._descriptions[kind]
            if description.data_size != len(self._places[name]):
                raise ValueError(f"it has {len(self._places[name]):,} bytes, and others by its header: it is damaged")
        return PackedSource(self, name, description, entry.digest)

    def read(self, name: str) -> bytes:
        """The bytes of a tensor.

        Raises:
            ValueError: the file was closed or cut off.
        """
        place = self._places[name]
        if not self.close.alive:
            raise ValueError(f"{self.path} was closed; open it again with Pack.open")
        with self._lock:
            if sys.platform == "win32":
                os.lseek(self._descriptor, place.start, os.SEEK_SET)
                data = os.read(self._descriptor, len(place))
            else:
                # By no position, which a forked process would share.
                data = os.pread(self._descriptor, len(place), place.start)
        if len(data) != len(place):
            raise ValueError(f"{self.path} was cut off while it was open; pack the adapters again")
        return data


class PackedSource(NamedTuple):
    """One adapter of an open pack."""

    pack: Pack
    name: str
    description: Description
    digest: str

    @property
    def content(self) -> Content:
        """What it consists of."""
        return self.description.content

    @property
    def config(self) -> DVoRAConfig:
        """Its settings."""
        return self.description.config

    @property
    def beside(self) -> Mapping[str, Shape]:
        """Shapes of what its file has besides the adapter."""
        return self.description.beside

    def read(self) -> AdapterValues:
        """The values.

        Raises:
            ValueError: they are damaged, not finite, or others than were packed.
        """
        return self.data()[1]

    def data(self) -> tuple[bytes, AdapterValues]:
        """The data behind the header, and the values in it.

        Raises:
            ValueError: they are damaged, not finite, or others than were packed.
        """
        with errors_of(f"{self.pack.path}: adapter {self.name!r}"):
            data = self.pack.read(self.name)
            values = values_of(self.description, data)
            if self.description.digest(values) != self.digest:
                raise ValueError("it is damaged: its files are not those that were packed; pack the adapters again")
            return data, values


def write_pack(path: Path, folders: Mapping[str, Path], on_progress: OnProgress | None = None) -> None:
    """Write adapters into one file; one of that name is replaced when all is written. One adapter is held at a time.

    Args:
        path: of the pack.
        folders: of the adapters, by the names that they have in the pack.
        on_progress: see `OnProgress`.

    Raises:
        ValueError: a name cannot be that of a folder; or a folder holds no adapter, a damaged one, or changes; or the
            pack would take the place of one of their files.
        OSError: the file cannot be written; what was there before is there still.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"path: {path} is a folder, a pipe or a device; name a file")
    if not folders:
        raise ValueError("folders: there are no adapters to pack")
    check_folder_names(folders)
    sources = {name: FolderSource(folders[name]) for name in sorted(folders)}
    if clash := [s.folder for s in sources.values() for n in (SETTINGS, VALUES) if _is_same(path, s.folder / n)]:
        raise ValueError(f"path: {path} is a file of the adapter in {clash[0]}, which is to be packed; name another")
    kinds = [dict.fromkeys(texts) for texts in zip(*map(_texts, sources.values()), strict=True)]
    numbers = [{text: number for number, text in enumerate(texts)} for texts in kinds]
    entries = {
        name: Entry(numbers[0][source.description.settings], numbers[1][source.description.header], "0" * 32)
        for name, source in sources.items()
    }
    with claimed(path) as unfinished:
        with (unfinished / "pack").open("wb") as file:
            _write(file, sources, kinds, entries, on_progress)
            file.flush()
            os.fsync(file.fileno())
        (unfinished / "pack").replace(path)
    unfinished.rmdir()


def unpack(path: Path, output: Path, on_progress: OnProgress | None = None) -> None:
    """Write the adapters of a pack into a new folder: a folder for each, byte for byte what was packed.

    Raises:
        ValueError: the pack is truncated or damaged, or a name cannot be that of a folder; nothing is left of it then.
        FileExistsError: there is something in the folder.
        OSError: it cannot be written; nothing of it is left.
    """
    with Pack.open(path) as pack, new_folder(output) as filling:
        for number, name in enumerate(pack.entries, start=1):
            description = (source := pack.source(name)).description
            data, _ = source.data()
            (filling / name).mkdir()
            (filling / name / SETTINGS).write_bytes(description.settings)
            (filling / name / VALUES).write_bytes(description.header + data)
            if on_progress is not None:
                on_progress(number, len(pack.entries))


def check_folder_names(names: Mapping[str, object]) -> None:
    """Refuse names that some system could not give to a folder, or give to two.

    Raises:
        ValueError: a name is one.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= 200):
            raise ValueError(f"an adapter's name must have 1 to 200 bytes of printable characters, got {name!r:.300}")
        if set(name) & set('/\\:*?"<>|') or name[0] == "." or name[-1] in ". " or _RESERVED.fullmatch(name):
            raise ValueError(
                f"the name {name!r} cannot be that of a folder everywhere: no path, no name of a device such as 'con', "
                "no dot in front, neither dot nor space at the end; rename the adapter"
            )
        if (other := seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            raise ValueError(f"{other!r} and {name!r} are one folder on some systems; rename one of them")


def _write(
    file: BinaryIO,
    sources: Mapping[str, FolderSource],
    kinds: list[dict[bytes, None]],
    entries: dict[str, Entry],
    on_progress: OnProgress | None,
) -> None:
    """Write all adapters behind a header without digests, and at last that header with them, which is as long."""
    file.write(_header(sources, kinds, entries))
    for texts in kinds:
        file.writelines(texts)
    for number, (name, source) in enumerate(sources.items(), start=1):
        data = source.data()
        file.write(data)
        with errors_of(source.folder):
            values = values_of(source.description, data)
        entries[name] = entries[name]._replace(digest=source.description.digest(values))
        if on_progress is not None:
            on_progress(number, len(sources))
    file.seek(0)
    file.write(_header(sources, kinds, entries))


def _texts(source: FolderSource) -> tuple[bytes, bytes]:
    return source.description.settings, source.description.header


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and path.samefile(other)


def _header(sources: Mapping[str, FolderSource], kinds: list[dict[bytes, None]], entries: Mapping[str, Entry]) -> bytes:
    """The header of the pack's own file."""
    settings, headers = kinds
    parts = [(f".settings.{number}", len(text)) for number, text in enumerate(settings)]
    parts += [(f".header.{number}", len(text)) for number, text in enumerate(headers)]
    parts += [(name, source.description.data_size) for name, source in sources.items()]
    saved: dict[str, object] = {"__metadata__": {"format": FORMAT, "adapters": json.dumps(entries)}}
    start = 0
    for name, length in parts:
        floats = name in sources and sources[name].description.dtype == torch.float32
        dtype, count = ("F32", length // 4) if floats else ("U8", length)
        saved[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, start := start + length]}
    text = json.dumps(saved, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_INDEX:
        raise ValueError(f"folders: {len(sources):,} adapters are more than a pack can index; make several packs")
    return len(text).to_bytes(8, "little") + text


def _read_index(file: BinaryIO, largest_header: int) -> tuple[dict[str, range], dict[str, Entry]]:
    """Where each tensor stands in a pack, and the entry of each adapter.

    Raises:
        ValueError: it is no pack, of another version, or damaged.
    """
    size = os.fstat(file.fileno()).st_size
    length = 8 + int.from_bytes(file.read(8), "little")
    if not 8 < length <= min(size, LARGEST_INDEX, largest_header):
        raise ValueError("it is no pack; a pack is a file that `dvora bank pack` wrote")
    try:
        saved = json.loads(file.read(length - 8))
        metadata = saved.pop("__metadata__", None) or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is another safetensors file than a pack of this version ({FORMAT}); pack again")
        offsets = {name: tuple(map(int, entry["data_offsets"])) for name, entry in saved.items()}
        entries = {name: Entry(int(s), int(h), str(d)) for name, (s, h, d) in json.loads(metadata["adapters"]).items()}
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"its index is damaged ({error!r:.200}); pack the adapters again") from error
    places = {name: range(length + start, length + stop) for name, (start, stop) in offsets.items()}
    end = length
    for place in places.values():
        if place.start != end or place.stop < place.start:
            raise ValueError("its index is damaged: tensors do not follow one another; pack the adapters again")
        end = place.stop
    if end != size:
        raise ValueError(f"it has {size:,} bytes, and {end:,} by its index: it is truncated or damaged")
    check_folder_names(entries)
    largest = {f".settings.{entry.settings}": min(LARGEST_SETTINGS, largest_header) for entry in entries.values()}
    largest |= {f".header.{entry.header}": largest_header for entry in entries.values()}
    if not entries or places.keys() != entries.keys() | largest.keys():
        raise ValueError("its index is damaged: adapters and tensors differ; pack the adapters again")
    if too_large := [name for name in largest if len(places[name]) > largest[name]]:
        raise ValueError(f"its {too_large[0]} has {len(places[too_large[0]]):,} bytes, more than any adapter's")
    return places, entries
