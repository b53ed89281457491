"""The header of a pack: which adapters are in it, and where. Written before and after their bytes, checked when read.

A pack is a safetensors file, so other programs can open it, with up to three tensors, in this order:

| tensor | shape | what |
|---|---|---|
| factors | (N, F) | optional: what serving needs of each adapter, computed for one base |
| heads | (N, H) | optional, beside factors: what is saved whole, in the dtype of that base |
| files | (bytes,) | both files of each adapter, one behind the other |

Rows and files stand in the order of the names. The index, with sizes and checksums, is in the header's metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

import torch

from .saved import LARGEST_HEADER

FORMAT_VERSION = "1"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of rows, by the names that safetensors has for them."""
UNKNOWN = "0" * 32
"""Stands for a checksum, in as many letters, until the bytes are written."""
_CHECKSUM = re.compile(r"[0-9a-f]{32}")
_ALIGNED = 64


class RowFormat(NamedTuple):
    """Which rows a pack has."""

    key: str
    """Of the base and of what was computed: rows are used where both are the same."""
    dtype: str
    width: int
    head_dtype: str
    head_width: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Bytes of a row of factors, and of one of heads."""
        return self.width * DTYPES[self.dtype].itemsize, self.head_width * DTYPES[self.head_dtype].itemsize


class Entry(NamedTuple):
    """What the index says of one adapter."""

    name: str
    settings: int
    """Bytes of adapter_config.json; adapter_model.safetensors stands behind it."""
    values: int
    digest: str
    """Of `AdapterValues`."""
    known: str
    """Checksum of settings and header, which are parsed once for all adapters with the same."""
    files: str
    """Checksum of both files."""
    rows: str
    """Checksum of both rows."""

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return self.settings + self.values


class Places(NamedTuple):
    """Where the bytes of adapters begin in the file."""

    files: tuple[int, ...]
    sizes: tuple[int, ...]
    """Of the first file of each."""
    rows: tuple[int, int]
    """The first row of factors, and of heads."""
    lengths: tuple[int, int]
    """Of these rows."""

    def of(self, number: int) -> tuple[int, int, int, int]:
        """Of settings, values, factors and heads of one adapter."""
        files = self.files[number]
        factors, heads = (at + number * length for at, length in zip(self.rows, self.lengths, strict=True))
        return files, files + self.sizes[number], factors, heads


class Index(NamedTuple):
    """What is where in a pack."""

    rows: RowFormat | None
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """The beginning of the file; its length does not depend on checksums.

        Raises:
            ValueError: it would be longer than safetensors reads.
        """
        index = json.dumps(self, separators=(",", ":"))
        metadata = {"dvora_pack": FORMAT_VERSION, "index": index, "checksum": checksum(index.encode())}
        text = json.dumps({"__metadata__": metadata, **self.tensors()}, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNED)
        if len(text) > LARGEST_HEADER:
            raise ValueError(f"folders: {len(self.entries):,} adapters are too many for one pack; make several")
        return len(text).to_bytes(8, "little") + text

    def tensors(self) -> dict[str, dict[str, Any]]:
        """The tensors as the header describes them."""
        count, rows = len(self.entries), self.rows
        shapes: dict[str, tuple[str, int, list[int]]] = {}
        if rows is not None:
            shapes["factors"] = rows.dtype, rows.lengths[0] * count, [count, rows.width]
            if rows.head_width:
                shapes["heads"] = rows.head_dtype, rows.lengths[1] * count, [count, rows.head_width]
        size = sum(entry.size for entry in self.entries)
        shapes["files"] = "U8", size, [size]
        ends = list(accumulate(size for _, size, _ in shapes.values()))
        return {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [end - size, end]}
            for (name, (dtype, size, shape)), end in zip(shapes.items(), ends, strict=True)
        }

    def places(self, start: int) -> Places:
        """Where what is, if the tensors begin there."""
        begin = {name: start + tensor["data_offsets"][0] for name, tensor in self.tensors().items()}
        return Places(
            tuple(accumulate((entry.size for entry in self.entries), initial=begin["files"])),
            tuple(entry.settings for entry in self.entries),
            (begin.get("factors", start), begin.get("heads", start)),
            (0, 0) if self.rows is None else self.rows.lengths,
        )


def read_index(path: Path, file: BinaryIO) -> tuple[Index, int]:
    """The index of a file that was opened, and where its tensors begin.

    Raises:
        ValueError: it is no pack, of another version, truncated or damaged.
    """
    size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
    if size < 8 or length > LARGEST_HEADER:
        raise ValueError(f"{path} is no pack: it does not begin as a file of `dvora bank pack` does")
    if size < 8 + length:
        raise ValueError(f"{path} is truncated: it has {size:,} bytes, its header alone has {8 + length:,}")
    metadata, tensors = _parsed_header(path, file.read(length))
    if metadata.get("dvora_pack") != FORMAT_VERSION:
        found = metadata.get("dvora_pack")
        raise ValueError(
            f"{path} is no pack, but another safetensors file"
            if found is None
            else f"{path} is a pack of format {found!r:.20}, expected {FORMAT_VERSION!r}; pack the adapters again"
        )
    index = _parsed_index(path, metadata)
    if tensors != index.tensors():
        raise ValueError(f"{path} is damaged: its tensors are not those of its index; pack the adapters again")
    expected = 8 + length + tensors["files"]["data_offsets"][1]
    if size != expected:
        raise ValueError(f"{path} is truncated or damaged: it has {size:,} bytes, expected {expected:,}")
    return index, 8 + length


def check_name(name: object) -> None:
    """Refuse what is no name of a folder: unpacked, adapters stay in their folder.

    Raises:
        ValueError: it is none, on this or on another system.
    """
    if not isinstance(name, str) or not _is_plain(name):
        raise ValueError(f"{name!r:.100} cannot be the name of an adapter in a pack, expected one of a folder, no path")
    if len(name.encode()) > 255:
        raise ValueError(f"{name!r:.100} is longer than 255 bytes, and so no name of a folder")


def _is_plain(name: str) -> bool:
    """Whether it names one folder on every system; printable text has no surrogates, so it can be encoded."""
    one = all(kind(name).name == name for kind in (PurePosixPath, PureWindowsPath))
    return one and name.isprintable() and name not in ("", ".", "..")


def checksum(*parts: bytes | memoryview) -> str:
    """32 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:32]


def _parsed_header(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors."""
    try:
        tensors = json.loads(text)
        return dict(tensors.pop("__metadata__", {})), tensors
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no pack, or damaged: its header cannot be read ({error!r:.200})") from error


def _parsed_index(path: Path, metadata: dict[str, Any]) -> Index:
    """The index, in which nothing is trusted: whoever made the file made its checksum too."""
    try:
        if checksum(metadata["index"].encode()) != metadata["checksum"]:
            raise ValueError("its checksum is another one")
        rows, entries = json.loads(metadata["index"])
        index = Index(None if rows is None else RowFormat(*rows), tuple(Entry(*entry) for entry in entries))
        _check_index(index)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its index cannot be used ({error!r:.200}); pack it again") from error
    return index


def _check_index(index: Index) -> None:
    if index.rows is not None:
        _check_kinds(index.rows, (str, str, int, str, int))
        if not (
            index.rows.width > 0 <= index.rows.head_width and {index.rows.dtype, index.rows.head_dtype} <= set(DTYPES)
        ):
            raise ValueError(f"{index.rows} are no rows")
    for entry in index.entries:
        _check_kinds(entry, (str, int, int, str, str, str, str))
        check_name(entry.name)
        if min(entry.settings, entry.values) < 1 or not all(map(_CHECKSUM.fullmatch, entry[3:])):
            raise ValueError(f"{entry} is no adapter")
    names = [entry.name for entry in index.entries]
    if not names or names != sorted(set(names)):
        raise ValueError("its names are not sorted, or not unique")


def _check_kinds(values: Sequence[object], kinds: tuple[type, ...]) -> None:
    if tuple(map(type, values)) != kinds:
        raise TypeError(f"expected {[kind.__name__ for kind in kinds]}, got {values!r:.100}")
