"""Adapters by name: which version answers now, which old ones requests still use, and what is on disk for a restart.

A version is what one load brought. The bank knows it by a key of its own, so a text that began with one version ends
with it, whatever is loaded under the name meanwhile. Its name and the requests that use it hold it; when none does, it
leaves the bank, and its upload the disk.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pydantic_core import to_json

from ..adapter_file.values import Description, FolderSource
from ..whole_files import remove
from .base import Base
from .keys import BASE, Key
from .requests import RefusedError
from .store import Store, Stored
from .uploads import Upload

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of adapters: what can stand in a path, a header and a label; no colon, which divides a base from its adapter."""
_log = logging.getLogger("dvora.serve")


@dataclass(eq=False)
class Version:
    """One load of an adapter.

    Args:
        name: what clients call it.
        key: what the bank calls it.
        stored: where it is on the disk.
    """

    name: str
    key: str
    stored: Stored
    digest: str | None = None
    """Of its content; None until it is first used."""
    holds: int = 1
    """Of its name, and of every request that uses it."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the head's outputs; empty where nobody said."""
        return self.stored.labels

    @property
    def description(self) -> Description:
        """Its settings, names and shapes."""
        return self.stored.source.description


@dataclass(eq=False)
class Registry:
    """The adapters of a server, safe under threads.

    Args:
        base: the base model, whose bank serves them.
        store: their files.
    """

    base: Base
    store: Store
    damaged: dict[str, str] = field(default_factory=dict)
    """Why what has these names was left out when the server started."""
    _versions: dict[str, Version] = field(default_factory=dict)
    _changes: int = 0
    """Of what lists say."""
    _lists: dict[tuple[str, tuple[str, ...]], tuple[int, bytes]] = field(default_factory=dict)
    """With the number of changes before them."""
    _loads: Iterator[int] = field(default_factory=lambda: count(1))
    """Numbers of versions: no name has a colon, so no two of them have one key."""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    """Held while names change."""
    _changing: threading.RLock = field(default_factory=threading.RLock)
    """Held during a load, so that loads come one after another."""

    def open(self, opened: dict[str, Stored], damaged: dict[str, str]) -> None:
        """Take what is on disk: the adapters that the server was given, and what clients loaded and deleted later.

        What cannot be served is left out.

        Args:
            opened, damaged: of the store.

        Raises:
            ValueError: there are adapters, and none can be served.
        """
        self.damaged = dict(damaged)
        for name, stored in opened.items():
            try:
                self._check_name(name)
                self._versions[name] = self._loaded(name, stored, read=stored.digest is not None)
            except (RefusedError, ValueError, TypeError, OSError) as error:
                self.damaged[name] = self.store.told(error)
        for name, reason in self.damaged.items():
            _log.warning("%s is left out: %s", name, reason)
        if self.damaged and not self._versions and not self.store.index:
            name, reason = next(iter(self.damaged.items()))
            raise ValueError(f"none of the {len(self.damaged)} adapters can be served; {name}: {reason}")
        self.store.sweep()

    def follow(self) -> None:
        """Take what other servers changed that share the files.

        Raises:
            RefusedError: 503, what they left cannot be read here.
        """
        with self._changing:
            if not self.store.is_behind():
                return
            try:
                with self.store.catching_up() as changed:
                    for name, entry in changed.items():
                        self._point(name, None if entry is None else self._loaded(name, self.store.stored(entry)))
            except (ValueError, TypeError, OSError, RefusedError) as error:
                message = f"what other servers changed cannot be read: {self.store.told(error)}"
                raise RefusedError(503, message, "unavailable") from error

    def _loaded(self, name: str, stored: Stored, *, read: bool = True) -> Version:
        """A version of what is on the disk, which the bank has; what was put once must be what was put."""
        key = f"{name}:{next(self._loads)}" if read else name
        # The bank's first adapter says which layers are hooked, which happens between passes.
        with nullcontext() if self.base.bank.serves and len(self.base.bank) else self.base.between_passes():
            self.base.bank.add(key, stored.source, allow_unchanged=True, read=read)
        version = Version(name, key, stored, self.base.bank.digest(key) if read else None)
        if stored.digest not in (None, version.digest):
            self.base.bank.remove(key)
            raise ValueError("its files are other ones than were put; put it again")
        return version

    def _point(self, name: str, version: Version | None) -> Version | None:
        """Have a name answered by a version from now on; gives the one before."""
        with self._lock:
            before = self._versions.pop(name, None)
            if version is not None:
                self._versions[name] = version
            self.damaged.pop(name, None)
            self._changes += 1
        if before is not None:
            self._release(before)
        return before

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
            RefusedError: 404, there is no such model, or none for this key; 422, it was left out as it is damaged.
        """
        name = model.removeprefix(f"{self.base.name}:")
        if name != self.base.name:
            return self.adapter(name, key)
        if not key.sees(None):
            raise _unknown(name)
        return None

    def adapter(self, name: str, key: Key) -> str:
        """The name of an adapter, if there is one of that.

        Raises:
            RefusedError: as `named`.
        """
        if not key.sees(name) or (name not in self._versions and name not in self.damaged):
            raise _unknown(name)
        if name not in self._versions:
            raise RefusedError(422, f"the adapter {name!r} cannot be served: {self.damaged[name]}", "adapter_error")
        return name

    def listed(self, what: str, key: Key, content_of: Callable[[Sequence[Version]], dict[str, Any]]) -> bytes:
        """A list of all versions that a key sees, and why others were left out, written once until something changes.

        Args:
            what: is listed.
            key: of the client.
            content_of: gives the JSON of versions.
        """
        place, changes = (what, key.names), self._changes
        if place not in self._lists or self._lists[place][0] != changes:
            content = content_of([version for version in self.versions() if key.sees(version.name)])
            left_out = [{"name": name, "reason": why} for name, why in self.damaged.items() if key.sees(name)]
            self._lists[place] = changes, to_json({**content, "left_out": left_out})
        return self._lists[place][1]

    def like(self, name: str | None, key: Key) -> Description | None:
        """What a vector has to be like: of an adapter, or of the first that the key sees."""
        with self._lock:
            if name in self._versions:
                return self._versions[name].description
            return next((version.description for version in self.versions() if key.sees(version.name)), None)

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
                    version.digest = self.base.bank.digest(version.key)
                    self._changes += 1
                except (ValueError, TypeError, OSError) as error:
                    message = f"the adapter {name!r} cannot be read: {self.store.told(error)}"
                    raise RefusedError(422, message, "adapter_error") from error
            yield version
        finally:
            self._release(version)

    def put(self, name: str, upload: Upload, *, key: Key, replaces: bool = True) -> tuple[Version, bool]:
        """Serve what a client sent under a name from now on, and after a restart.

        Args:
            name: new, or that of an adapter which is replaced.
            upload: what was sent.
            key: of the client, who learns nothing of other adapters than its own.
            replaces: False: a name that is taken keeps its adapter, which has to be the one that was sent.

        Returns:
            The version, and whether there was one of its name.

        Raises:
            RefusedError: 400, the name cannot be one; 409, it is taken by another adapter that must not be
                replaced; 422, the adapter is damaged, of another base or kind, or has another number of classes than
                labels; 507, it cannot be written.
        """
        with self._change(name):
            before = self._versions.get(name)
            if not replaces and name in self.damaged:
                raise _taken(name)
            is_new = before is None or not replaces
            files = upload.files(self.like(name, Key()), self.base.name if is_new else None)
            folder = self.store.write(files)
            with ExitStack() as unused:
                unused.callback(remove, folder)
                labels = upload.labels or (before.labels if before is not None else ())
                stored = Stored(FolderSource(folder), labels, folder)
                if len(labels) not in (0, outputs := stored.adapter.label_count):
                    if upload.labels:
                        raise ValueError(f"labels: there are {len(labels)}, and the head has {outputs or 'no'} outputs")
                    # Those of the version before name other classes.
                    stored = stored._replace(labels=())
                if before is None or replaces:
                    version = self._load(name, stored, hides=not key.sees_all)
                    unused.pop_all()
                    return version, before is not None
                self.warm(name)
                if (self.base.bank.digest_of(stored.source), stored.labels) != (before.digest, before.labels):
                    raise _taken(name)
                return before, True

    def load(self, name: str, path: str, *, replaces: bool) -> Version:
        """Serve the adapter of a folder under a name from now on, and after a restart.

        Args:
            name: new, or that of an adapter which is replaced.
            path: of the folder, below the store's; it must not change while it is served.
            replaces: False: refuse a name that is taken.

        Raises:
            RefusedError: 400, the name cannot be one or is taken, or the path leads out of the folder; 422, as `put`.
        """
        with self._change(name):
            if name in self and not replaces:
                message = f"the adapter {name!r} is loaded already; pass load_inplace, or unload it first"
                raise RefusedError(400, message, "InvalidUserInput")
            return self._load(name, self.store.given_in(self.store.below(path)))

    def delete(self, name: str) -> Version | None:
        """Serve an adapter no longer, also after a restart; requests that use it end with it.

        Returns:
            What was served; None where it was damaged.

        Raises:
            RefusedError: 404, there is no such adapter; 507, the index cannot be written.
        """
        with self._change(None):
            if name not in self._versions and name not in self.damaged:
                raise _unknown(name)
            # First: after an error it is served still.
            self.store.forget(name)
            return self._point(name, None)

    @contextmanager
    def _change(self, name: str | None) -> Iterator[None]:
        """One change after another, of what all servers have that share the files; errors as clients read them."""
        if name is not None:
            self._check_name(name)
        with self._changing, self.store.changing():
            self.follow()
            try:
                yield
            except (ValueError, TypeError) as error:
                message = f"the adapter cannot be served: {self.store.told(error)}"
                raise RefusedError(422, message, "adapter_error") from error
            except OSError as error:
                _log.exception("a change was not made")
                message = f"nothing was changed: the server's files cannot be written ({error.strerror})"
                raise RefusedError(507, message, "storage_error") from error

    def _load(self, name: str, stored: Stored, hides: bool = False) -> Version:
        """Serve an adapter that is on the disk; it is read, checked and made ready here, not in the engine's thread.

        Args:
            name: of the adapter.
            stored: where it is.
            hides: whether errors may say nothing of other adapters.
        """
        self.base.check_task(stored.source.description)
        try:
            version = self._loaded(name, stored)
        except ValueError as error:
            if not hides:
                raise
            message = "it is of another base, rank or other layers than this server takes, or its values are not finite"
            raise ValueError(message) from error
        try:
            self.store.keep(name, stored, str(version.digest))
        except BaseException:
            self.base.bank.remove(version.key)
            raise
        self._point(name, version)
        return version

    def _release(self, version: Version) -> None:
        with self._lock:
            version.holds -= 1
            is_unused = not version.holds
        if is_unused:
            self.base.bank.remove(version.key)
            if version.stored.upload is not None and not self.store.is_shared:
                # What stays is swept when the server starts again.
                with suppress(OSError):
                    remove(version.stored.upload)

    def card(self, version: Version) -> dict[str, Any]:
        """What clients are told of an adapter."""
        return {
            "name": version.name,
            "base": self.base.name,
            "digest": version.digest,
            "labels": list(version.labels),
            "uploaded": version.stored.upload is not None,
        }

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise RefusedError(
                400,
                f"{name[:200]!r} cannot name an adapter; use letters, digits, dots, hyphens and underscores, at most "
                "128, with a letter or a digit first",
                "InvalidUserInput",
            )
        if name in (BASE, self.base.name):
            raise RefusedError(400, f"{name!r} is the base model; choose another name", "InvalidUserInput")


def _taken(name: str) -> RefusedError:
    return RefusedError(
        409, f"there is an adapter {name!r} with another content; send this one under another name", "ConflictError"
    )


def _unknown(name: str) -> RefusedError:
    return RefusedError(404, f"there is no model {name[:200]!r}; GET /v1/models lists what there is", "NotFoundError")
