"""A saved adapter as the bytes of its two files: what settings and header say of it, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..peft.config import DVoRAConfig, Shape
from ..peft.content import Content, in_order
from ..peft.saving import PEFT_PREFIX, check_file, plain_name

SETTINGS, VALUES = "adapter_config.json", "adapter_model.safetensors"
LARGEST_SETTINGS, LARGEST_HEADER = 2**24, 100_000_000
"""Bytes; the second is safetensors' own limit."""


class Described(NamedTuple):
    """What settings and the header of the values say."""

    config: DVoRAConfig
    content: Content
    size: int
    """Bytes of the file of values."""


class AdapterFiles(NamedTuple):
    """The two files of a saved adapter, as they were at one moment."""

    settings: bytes
    values: bytes

    @classmethod
    def of(cls, folder: Path) -> AdapterFiles:
        """Those in a folder.

        Raises:
            ValueError: they changed while they were read, or one is not there.
        """
        before = _state(folder)
        files = cls(*((folder / name).read_bytes() for name in (SETTINGS, VALUES)))
        if _state(folder) != before or tuple(map(len, files)) != file_sizes(folder):
            raise ValueError("it changed while it was read; read it again when whoever writes to it is done")
        return files

    @property
    def header(self) -> bytes:
        """The beginning of the file of values, with its length."""
        return self.values[: header_length(self.values, len(self.values))]

    def described(self) -> Described:
        """What they say.

        Raises:
            TypeError, ValueError: see `described`.
        """
        return described(self.settings, self.header)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adapter's entries, in the order of a vector, and what else is in the file of values, as it is there.

        Raises:
            TypeError, ValueError, SafetensorError: a file is damaged.
        """
        saved = load(self.values)
        own = in_order(saved, self.described().config)
        beside = {key: saved[key] for key in saved if plain_name(key.removeprefix(PEFT_PREFIX)) not in own}
        if len(own) + len(beside) != len(saved):
            raise ValueError(f"{VALUES} has two entries of one name, with and without a compiler's prefixes; keep one")
        return own, beside


@lru_cache(maxsize=64)
def described(settings: bytes, header: bytes) -> Described:
    """What an adapter is. Adapters of one recipe have the same settings and headers, which are parsed once.

    Args:
        settings: the file of settings.
        header: the beginning of the file of values, with its length.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA, or damaged.
    """
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        shapes: dict[str, Shape] = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        size = len(header) + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{VALUES} is damaged: its header cannot be read ({error!r:.200})") from error
    config = DVoRAConfig.from_bytes(settings, shapes)
    if not isinstance(config, DVoRAConfig):
        raise TypeError(f"it is an adapter of type {config.peft_type}; only adapters of DVoRA share their matrices")
    check_file(config)
    content = Content.of_saved(config, shapes)
    if not content.layers:
        raise ValueError(f"{VALUES} has no vectors of any layer; save the adapter again")
    return Described(config, content, size)


def described_in(folder: Path) -> tuple[bytes, Described]:
    """The settings of an adapter in a folder, and what it is; its values are not read.

    Raises:
        TypeError, ValueError: there is none, or a damaged one.
    """
    _, size = file_sizes(folder)
    settings = (folder / SETTINGS).read_bytes()
    with (folder / VALUES).open("rb") as file:
        first = file.read(8)
        found = described(settings, first + file.read(header_length(first, size) - 8))
    if found.size != size:
        raise ValueError(f"{VALUES} has {size:,} bytes, and {found.size:,} by its header: it is truncated or damaged")
    return settings, found


def header_length(first: bytes, size: int) -> int:
    """Bytes of the header of a safetensors file, with the eight that have its length.

    Args:
        first: the first eight bytes of the file, or more.
        size: of the file.

    Raises:
        ValueError: the file is too short, or is none.
    """
    length = 8 + int.from_bytes(first[:8], "little")
    if len(first) < 8 or not 8 < length <= min(size, LARGEST_HEADER):
        raise ValueError(f"{VALUES} is truncated, or no safetensors file: it has {size:,} bytes and no whole header")
    return length


def file_sizes(folder: Path) -> tuple[int, int]:
    """Bytes of both files of an adapter.

    Raises:
        ValueError: one is not there, no file, or too large.
    """
    for name in (SETTINGS, VALUES):
        if not (folder / name).is_file():
            advice = "; a pickled adapter_model.bin is not read, save it again" if name == VALUES else ""
            raise ValueError(f"there is no file {name}, so it is no folder with a saved adapter{advice}")
    settings, values = ((folder / name).stat().st_size for name in (SETTINGS, VALUES))
    if settings > LARGEST_SETTINGS:
        raise ValueError(f"{SETTINGS} has {settings:,} bytes, expected at most {LARGEST_SETTINGS:,}")
    return settings, values


@contextmanager
def told_of(where: object) -> Iterator[None]:
    """Around what reads an adapter: its errors become ValueErrors that begin with where it was."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{where}: {error.filename} is no longer there") from error
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{where}: {str(error).removeprefix('source: ')}") from error


def _state(folder: Path) -> list[tuple[int, int, int]]:
    """What changes when one of the files is written, or another takes its place."""
    states = [(folder / name).stat() for name in (SETTINGS, VALUES)]
    return [(state.st_size, state.st_mtime_ns, state.st_ino) for state in states]
