"""Adapters by name: which version answers now, which old ones requests still use, and what is on disk for a restart.

A version is what one load brought. The bank knows it by a key of its own, so a text that began with one version ends
with it, whatever is loaded under the name meanwhile. Its name and the requests that use it hold it; when none does, it
leaves the bank, and its upload the disk.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..bank import AdapterBank
from ..whole_files import remove
from .keys import Key
from .requests import RefusedError
from .store import Entry, Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of adapters: what can stand in a path, a header and a label; no colon, which divides a base from its adapter."""


@dataclass(eq=False)
class Version:
    """One load of an adapter.

    Args:
        name: what clients call it.
        key: what the bank calls it.
        labels: names of the classes, in the order of the head's outputs; empty where nobody said.
        upload: the folder that an upload made; None for what was there before.
    """

    name: str
    key: str
    labels: tuple[str, ...] = ()
    upload: Path | None = None
    digest: str | None = None
    """Of its content; None until it is first used."""
    holds: int = 1
    """Of its name, and of every request that uses it."""


@dataclass(eq=False)
class Registry:
    """The adapters of a server, safe under threads.

    Args:
        bank: which serves them.
        store: their files.
        base: the name of the base model.
    """

    bank: AdapterBank
    store: Store
    base: str
    _versions: dict[str, Version] = field(default_factory=dict)
    _loads: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while names change."""
    _changing: threading.Lock = field(default_factory=threading.Lock)
    """Held during a load, so that loads come one after another."""

    def open(self) -> None:
        """Take what is on disk: the adapters that the server was given, and what clients loaded and deleted later.

        Raises:
            ValueError: an adapter is damaged, of another base or kind, or has a name that no client could say.
        """
        for name in self.store.names():
            check_name(name)
        if self.store.pack is not None:
            self.bank.add_pack(self.store.pack)
            names: list[str] = list(self.bank)
        else:
            names = self.bank.add_folder(self.store.root) if self.store.given_folders() else []
        index = self.store.index
        for name in names:
            if name in index:
                # Replaced or deleted since.
                self.bank.remove(name)
            else:
                self._versions[name] = Version(name, name, self.store.labels_of(name))
        for name, entry in index.items():
            if entry is not None:
                self._versions[name] = self._opened(name, entry)
        self.store.sweep()

    def follow(self) -> None:
        """Take what other servers changed that share the files.

        Raises:
            RefusedError: 503, what they left cannot be read here.
        """
        with self._changing:
            self._follow()

    def _follow(self) -> None:
        if not self.store.is_behind():
            return
        try:
            with self.store.catching_up() as changed:
                for name, entry in changed.items():
                    version = None if entry is None else self._opened(name, entry)
                    with self._lock:
                        before = self._versions.get(name)
                        if version is not None:
                            self._versions[name] = version
                        elif before is not None:
                            del self._versions[name]
                    if before is not None:
                        self._release(before)
        except (ValueError, TypeError, OSError) as error:
            raise RefusedError(503, f"what other servers changed cannot be read: {error}", "unavailable") from error

    def _opened(self, name: str, entry: Entry) -> Version:
        """A version of what the index names."""
        folder = self.store.root / entry.folder
        self.bank.add(key := self._new_key(name), folder, allow_unchanged=True)
        return Version(name, key, entry.labels, folder if entry.is_upload else None, self.bank.digest(key))

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, name: object) -> bool:
        return name in self._versions

    def versions(self) -> list[Version]:
        """Those that answer now, by name."""
        with self._lock:
            return [self._versions[name] for name in sorted(self._versions)]

    def named(self, model: str, key: Key) -> str | None:
        """The adapter that a client's `model` names: an adapter, `base:adapter`, or the base, which is None.

        Raises:
            RefusedError: 404, there is no such model, or none that the key sees.
        """
        name = model.removeprefix(f"{self.base}:")
        adapter = None if name == self.base and name not in self._versions else name
        if not key.sees(adapter) or (adapter is not None and adapter not in self._versions):
            raise _unknown(model)
        return adapter

    def is_cold(self, name: str | None) -> bool:
        """Whether the adapter of a name was never read."""
        version = self._versions.get(name) if name is not None else None
        return version is not None and version.digest is None

    def warm(self, name: str | None) -> None:
        """Read an adapter before it is used.

        Raises:
            RefusedError: as `using`.
        """
        with self.using(name):
            pass

    @contextmanager
    def using(self, name: str | None) -> Iterator[Version | None]:
        """Hold the version that answers now under a name, whatever happens to the name; None is the base.

        Raises:
            RefusedError: 404, there is no such adapter; 422, its file is damaged.
        """
        if name is None:
            yield None
            return
        with self._lock:
            if (version := self._versions.get(name)) is None:
                raise _unknown(name)
            version.holds += 1
        try:
            if version.digest is None:
                try:
                    version.digest = self.bank.digest(version.key)
                except (ValueError, TypeError, OSError) as error:
                    raise RefusedError(422, f"the adapter {name!r} cannot be read: {error}", "adapter_error") from error
            yield version
        finally:
            self._release(version)

    def load(
        self, name: str, folder: Path, labels: tuple[str, ...] = (), *, is_upload: bool, replaces: bool = True
    ) -> tuple[Version, bool]:
        """Serve the adapter of a folder under a name from now on, and after a restart.

        Args:
            name: new, or that of an adapter which is replaced.
            folder: below the store's; it must not change while it is served.
            labels: names of the classes.
            is_upload: whether the folder is removed when the version is no longer used.
            replaces: False: refuse a name that is taken.

        Returns:
            The version, and whether it replaced another one.

        Raises:
            RefusedError: 400, the name cannot be one or is taken; 422, the adapter is damaged, of another base or kind.
        """
        check_name(name)
        with self._changing, self.store.changing():
            self._follow()
            if name in self and not replaces:
                raise RefusedError(
                    400,
                    f"the adapter {name!r} is loaded already; pass load_inplace, or unload it first",
                    "InvalidUserInput",
                )
            if name == self.base:
                raise RefusedError(400, f"{name!r} is the base model; choose another name", "InvalidUserInput")
            key = self._new_key(name)
            try:
                # Read, checked and made ready here, not in the engine's thread.
                self.bank.add(key, folder, allow_unchanged=True)
                labels = labels or self._labels_before(name)
                digest = self.bank.digest(key)
            except (ValueError, TypeError, OSError) as error:
                if key in self.bank:
                    self.bank.remove(key)
                raise RefusedError(422, f"the adapter cannot be served: {error}", "adapter_error") from error
            self.store.keep(name, folder, labels, is_upload, digest)
            version = Version(name, key, labels, folder if is_upload else None, digest)
            with self._lock:
                before = self._versions.get(name)
                self._versions[name] = version
            if before is not None:
                self._release(before)
            return version, before is not None

    def delete(self, name: str) -> Version:
        """Serve an adapter no longer, also after a restart; requests that use it end with it.

        Raises:
            RefusedError: 404, there is no such adapter.
        """
        with self._changing, self.store.changing():
            self._follow()
            with self._lock:
                if (version := self._versions.pop(name, None)) is None:
                    raise _unknown(name)
            self.store.forget(name)
            self._release(version)
            return version

    def _labels_before(self, name: str) -> tuple[str, ...]:
        """Of the adapter that is replaced; where the new head has another number of outputs they are not used."""
        return self._versions[name].labels if name in self._versions else ()

    def _new_key(self, name: str) -> str:
        """No name has a colon, so no two versions have one key."""
        self._loads += 1
        return f"{name}:{self._loads}"

    def _release(self, version: Version) -> None:
        with self._lock:
            version.holds -= 1
            is_unused = not version.holds
        if is_unused:
            self.bank.remove(version.key)
            if version.upload is not None and not self.store.is_shared:
                remove(version.upload)

    def card(self, version: Version) -> dict[str, Any]:
        """What clients are told of an adapter."""
        return {
            "name": version.name,
            "base": self.base,
            "digest": version.digest,
            "labels": list(version.labels),
            "in_flight": version.holds - (self._versions.get(version.name) is version),
            "uploaded": version.upload is not None,
        }


def check_name(name: str) -> None:
    """Refuse what cannot name an adapter.

    Raises:
        RefusedError: 400.
    """
    if not NAME.fullmatch(name):
        raise RefusedError(
            400,
            f"{name[:200]!r} cannot name an adapter; use letters, digits, dots, hyphens and underscores, at most 128, "
            "with a letter or a digit first",
            "InvalidUserInput",
        )


def _unknown(name: str) -> RefusedError:
    return RefusedError(404, f"there is no model {name[:200]!r}; GET /v1/models lists what there is", "NotFoundError")
