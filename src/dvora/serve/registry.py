"""Adapters by name: the versions that the bank has, and for a restart the index of the store.

A request that began with one version ends with it, whatever is loaded under the name meanwhile: the bank holds versions
while requests use them, and an upload leaves the disk with its version.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import cast

from ..adapter_file.uploads import Upload
from ..adapter_file.values import Description, FolderSource
from ..bank import UnknownAdapterError
from ..recipes.models.adapters import label_count
from ..whole_files import remove
from .access import BASE, Key
from .base import Base, nothing_served
from .requests import RefusedError
from .store import Served, Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Of adapters: what can stand in a path, a header and a label; no colon, which divides a base from its adapter."""
_log = logging.getLogger("dvora.serve")


class Registry:
    """The adapters of a server, safe under threads.

    Args:
        base: the base model, whose bank serves them.
        store: their files.

    Raises:
        ValueError: there are adapters, and none can be served; of several those that cannot are left out.
    """

    def __init__(self, base: Base, store: Store, opened: list[Served], damaged: dict[str, str]) -> None:
        self.base, self.bank, self.store = base, base.bank, store
        self.damaged = dict(damaged)
        """Why what has these names was left out when the server started."""
        self._changing = threading.RLock()
        """Held during a change, so that changes come one after another."""
        for version in opened:
            try:
                self._check_name(version.name)
                with self._loading(version, read=version.put_as is not None):
                    pass
            except (RefusedError, ValueError, TypeError, OSError) as error:
                self.damaged[version.name] = store.public(error)
        for name, reason in self.damaged.items():
            _log.warning("%s is left out: %s", name, reason)
        if self.damaged and not len(self.bank) and not store.index:
            raise ValueError(nothing_served(self.damaged))
        store.sweep()

    def follow(self) -> None:
        """Take what other servers changed that share the files; 503, if that cannot be read here."""
        with self._changing:
            if not self.store.is_stale:
                return
            try:
                with self.store.refreshing() as changed:
                    for name, entry in changed.items():
                        if entry is None:
                            self._remove(name)
                        else:
                            with self._loading(self.store.indexed(name, entry)):
                                pass
            except (ValueError, TypeError, OSError, RefusedError) as error:
                message = f"what other servers changed cannot be read: {self.store.public(error)}"
                raise RefusedError(503, message, "unavailable") from error

    @contextmanager
    def _loading(self, version: Served, *, read: bool = True) -> Iterator[None]:
        """Read and check a version, which its name has when the block ends; what was put once must be what was put."""
        with self.bank.loading(version, read=read):
            if version.put_as not in (None, version.digest):
                raise ValueError("its files are other ones than were put; put it again")
            yield
        version.discard = self.store.discard
        self.damaged.pop(version.name, None)

    def _remove(self, name: str) -> Served | None:
        self.damaged.pop(name, None)
        if (version := self.version(name)) is not None:
            self.bank.remove(name)
        return version

    def version(self, name: str | None) -> Served | None:
        """The version that answers now under a name."""
        return None if name is None else cast(Served | None, self.bank.version(name))

    def versions(self, key: Key | None = None) -> list[Served]:
        """Those that answer now, and that a key sees, by name."""
        versions = cast(list[Served], self.bank.versions())
        return versions if key is None else [version for version in versions if key.sees(version.name)]

    def left_out(self, key: Key) -> list[dict[str, str]]:
        """Of what a key sees, what could not be served when the server started."""
        return [{"name": name, "reason": why} for name, why in self.damaged.items() if key.sees(name)]

    def named(self, model: str, key: Key) -> str | None:
        """The adapter that a client's `model` names, or `base:model`; None is the base.

        It is 404 if there is none, or none for this key, and 422 if it was left out as it is damaged.
        """
        name = model.removeprefix(f"{self.base.name}:")
        adapter = None if name == self.base.name else name
        if not key.sees(adapter) or (adapter and adapter not in self.bank and adapter not in self.damaged):
            raise unknown(name)
        if adapter in self.damaged:
            raise RefusedError(422, f"the adapter {name!r} cannot be served: {self.damaged[name]}", "adapter_error")
        return adapter

    def like(self, name: str | None, key: Key) -> Description | None:
        """What a vector has to be like: of an adapter, or of the first that the key sees."""
        of_dvora = (version for version in self.versions(key) if version.source.content.layers)
        version = self.version(name) or next(of_dvora, None)
        return None if version is None else version.description

    @contextmanager
    def using(self, name: str | None) -> Iterator[Served | None]:
        """Hold the version that answers now under a name, whatever becomes of that; 404 without one, 422 if damaged."""
        with ExitStack() as held:
            try:
                version = None if name is None else held.enter_context(self.bank.using(name))
            except UnknownAdapterError:
                raise unknown(str(name)) from None
            except (ValueError, TypeError, OSError) as error:
                message = f"the adapter {name!r} cannot be read: {self.store.public(error)}"
                raise RefusedError(422, message, "adapter_error") from error
            yield cast(Served | None, version)

    def read(self, name: str | None) -> None:
        """Read an adapter that nobody has used yet; refusals as of `using`."""
        with self.using(name):
            pass

    def put(self, name: str, upload: Upload, *, key: Key) -> tuple[Served, bool]:
        """Serve what a client sent under a name from now on, and after a restart; whether there was one of the name.

        Args:
            name: of the adapter.
            upload: what was sent.
            key: of the client, who learns nothing of other adapters than its own.
        """
        with self._change(name), ExitStack() as unused:
            before = self.version(name)
            like = self.like(name, key) or self.like(None, Key()) or self.base.like
            # Nothing else may come from an adapter of another tenant, or another one of the same.
            if like.content.layers and before is None:
                like = replace(like, settings=self.base.common_settings(like))
            is_known = bool(like.content.layers) or before is not None
            folder = self.store.write(upload.files(like if is_known else None))
            unused.callback(remove, folder)
            labels = upload.labels or (() if before is None else before.labels)
            if len({*labels}) < len(labels):
                raise ValueError(f"labels: two classes have one name in {list(labels)}; name them apart")
            version = Served(name, FolderSource(folder), labels=labels, upload=folder)
            adapter = version.adapter
            if labels and len(labels) != (outputs := label_count(adapter, self.base.model)):
                whose = "" if upload.labels else ", of the adapter before"
                raise ValueError(
                    f"labels: there are {len(labels)}{whose}, and the head has {outputs or 'no'} outputs; put it with "
                    "labels=, one for each"
                )
            self._load(version, hides=not key.sees_all)
            unused.pop_all()
            return version, before is not None

    def load(self, name: str, path: str, *, replaces: bool) -> Served:
        """Serve the adapter of a folder below the store's, which must not change, as `put` does."""
        with self._change(name):
            if name in self.bank and not replaces:
                message = f"the adapter {name!r} is loaded already; pass load_inplace, or unload it first"
                raise RefusedError(400, message, "InvalidUserInput")
            return self._load(self.store.given_in(name, self.store.below(path)))

    def delete(self, name: str) -> Served | None:
        """Serve an adapter no longer, also after a restart; gives what was served, None where it was damaged."""
        with self._change(None):
            if name not in self.bank and name not in self.damaged:
                raise unknown(name)
            # First: after an error it is served still.
            self.store.forget(name)
            return self._remove(name)

    @contextmanager
    def _change(self, name: str | None) -> Iterator[None]:
        """One change after another, of what all servers have that share the files.

        Errors are as clients read them: 400 for what cannot be a name, 422 for the adapter, 507 for the disk.
        """
        if name is not None:
            self._check_name(name)
        with self._changing, self.store.changing():
            self.follow()
            try:
                yield
                if self.store.is_shared:
                    self.store.sweep()
            except (ValueError, TypeError) as error:
                message = f"the adapter cannot be served: {self.store.public(error)}"
                raise RefusedError(422, message, "adapter_error") from error
            except OSError as error:
                _log.exception("a change was not made")
                message = f"nothing was changed: the server's files cannot be written ({error.strerror})"
                raise RefusedError(507, message, "storage_error") from error

    def _load(self, version: Served, hides: bool = False) -> Served:
        """Serve an adapter that is on the disk; `hides` errors that say something of other adapters."""
        self.base.check_task(version.description)
        if self.base.has_tags and version.description.content.whole and not version.labels:
            raise ValueError(
                "labels: there are none, by which tokens become entities; put it with labels=, one for each output of "
                "its head, such as O, B-NAME and I-NAME"
            )
        try:
            with self._loading(version):
                # It answers when it is on the disk, and after an error the one before does.
                self.store.keep(version)
        except ValueError as error:
            if not hides:
                raise
            message = "it is of another base, rank or other layers than this server takes, or its values are not finite"
            raise ValueError(message) from error
        return version

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


def unknown(name: str) -> RefusedError:
    """What is said of a model that is not there, or not for this key."""
    return RefusedError(404, f"there is no model {name[:200]!r}; GET /v1/models lists what there is", "NotFoundError")
