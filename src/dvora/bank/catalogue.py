"""The adapters of a bank by name: each version's source, what names its content, and its rows once they are read."""

from __future__ import annotations

import difflib
import logging
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from .factors import FactorRows, Factors
from .host import HostTier
from .pack import PackedSource
from .sources import FolderSource, Source, VectorSource

AdapterSource = str | os.PathLike[str] | Tensor
"""The folder of an adapter, its file of values, or a flat vector in the order of `dvora.flat.Layout`."""
_log = logging.getLogger("dvora.bank")


@dataclass(eq=False)
class Adapter:
    """One version of an adapter under a name; a batch keeps the version that it began with."""

    name: str
    source: Source
    allow_unchanged: bool
    digest: str | None = None
    """Of its content; None until it is read."""
    pinned: bool = False


class Catalogue:
    """Names and their adapters, safe under threads.

    Args:
        host_bytes: of the rows that are kept in memory.
    """

    def __init__(self, host_bytes: int) -> None:
        self.host = HostTier(host_bytes)
        self.reads = 0
        self.lock = threading.RLock()
        """Held while names change."""
        self._adapters: dict[str, Adapter] = {}
        self._reading = threading.RLock()
        """Held while an adapter is read, so that none is read twice."""

    def check_new(self, names: Collection[str]) -> None:
        """Refuse names that are taken.

        Raises:
            TypeError, ValueError: one is, or is no name.
        """
        for name in names:
            if not isinstance(name, str) or not name:
                raise TypeError(f"name must be a string that is not empty, got {name!r}")
            if name in self._adapters:
                raise ValueError(f"name: there is an adapter {name!r} already; use bank.replace, or remove it first")

    def add(self, adapters: Sequence[Adapter]) -> list[str]:
        """Add adapters of new names: all or none.

        Raises:
            TypeError, ValueError: see `check_new`.
        """
        by_name = {adapter.name: adapter for adapter in adapters}
        with self.lock:
            self.check_new(by_name)
            self._adapters |= by_name
        return list(by_name)

    def put(self, adapter: Adapter) -> Adapter:
        """Give a name that is there another adapter; the one before comes back.

        Raises:
            ValueError: there is no such name.
        """
        with self.lock:
            (before,) = self.named([adapter.name])
            self._adapters[adapter.name] = adapter
            return before

    def remove(self, name: str) -> Adapter:
        """Forget a name; its adapter comes back.

        Raises:
            ValueError: there is no such name.
        """
        with self.lock:
            (before,) = self.named([name])
            return self._adapters.pop(before.name)

    def named(self, names: Collection[str]) -> list[Adapter]:
        """The adapters of some names as they are now.

        Raises:
            TypeError, ValueError: a name is unknown; the message has the nearest.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names, got {names!r}")
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"names must be strings, got {wrong[0]!r}")
        with self.lock:
            found = {name: self._adapters.get(name) for name in names}
        for name, adapter in found.items():
            if adapter is None:
                near = difflib.get_close_matches(str(name), list(self._adapters), 1)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise ValueError(f"names: there is no adapter {name!r} among the {len(self)} of the bank{hint}")
        return [adapter for adapter in found.values() if adapter is not None]

    def digests(self) -> set[str]:
        """What names the content of all that were read."""
        with self.lock:
            return {each.digest for each in self._adapters.values() if each.digest is not None}

    def pinned(self, besides: Adapter | None = None) -> set[str]:
        """What names the content of pinned adapters, but for one."""
        with self.lock:
            pinned = [each for each in self._adapters.values() if each.pinned and each is not besides]
        return {each.digest for each in pinned if each.digest is not None}

    def digest(self, adapter: Adapter, rows: FactorRows) -> str:
        """What names its content; it is read for that if it never was."""
        if adapter.digest is None:
            self.read(adapter, rows)
        assert adapter.digest is not None
        return adapter.digest

    def factors(self, adapter: Adapter, rows: FactorRows) -> Factors:
        """Its rows, from memory or its source."""
        known = None if adapter.digest is None else self.host.get(adapter.digest)
        return self.read(adapter, rows) if known is None else known

    def read(self, adapter: Adapter, rows: FactorRows) -> Factors:
        """Its rows from its source, checked; they are kept in memory.

        Raises:
            ValueError: it is damaged, has changed since it was first read, or changes nothing.
        """
        with self._reading:
            if adapter.digest is not None and (known := self.host.get(adapter.digest)) is not None:
                return known
            try:
                factors, digest = _made(adapter, rows)
                if adapter.digest not in (None, digest):
                    raise ValueError("it has other values than when it was first used; call bank.replace")
                if not adapter.allow_unchanged and rows.is_of_base(factors):
                    raise ValueError("it changes nothing; pass allow_unchanged=True if that is meant")
            except ValueError as error:
                raise ValueError(f"adapter {adapter.name!r}: {error}") from error
            adapter.digest = digest
            self.host.put(digest, factors)
            self.reads += 1
            _log.debug("read %s as %s", adapter.name, digest)
            return factors

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._adapters))


def source_of(given: AdapterSource, rows: FactorRows | None) -> Source:
    """Where an adapter can be read.

    Args:
        given: by the caller.
        rows: of the bank, which says what a vector is of.

    Raises:
        TypeError, ValueError: there is no adapter, or a vector comes before it is known what it is of.
    """
    if not isinstance(given, Tensor):
        path = as_path(given, "source")
        return FolderSource(path.parent if path.name == SAFETENSORS_WEIGHTS_NAME else path)
    if rows is None:
        raise ValueError(
            "the bank does not know yet what a vector is of; add the folder of an adapter first, or pass like="
        )
    return VectorSource(rows.served.content, rows.served.config, given)


def as_path(given: str | os.PathLike[str], argument: str) -> Path:
    """The path in an argument.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(given, str | os.PathLike):
        expected = "a path or a flat vector" if argument == "source" else "a path"
        raise TypeError(f"{argument} must be {expected}, got {given!r:.200}")
    return Path(given)


def _made(adapter: Adapter, rows: FactorRows) -> tuple[Factors, str]:
    """Rows and what names the content."""
    source = adapter.source
    if isinstance(source, PackedSource) and (packed := source.factors(rows.key)) is not None:
        return Factors(*packed), rows.identity(source.digest)
    values = source.read()
    return rows.of(values), rows.identity(values.digest)
