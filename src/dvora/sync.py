"""From a training model to where its adapter is served: one flat vector a version, whole or not at all.

A `Publisher` takes the vector of an adapter and puts it into a target under a name of its own: `policy-v1`, then
`policy-v2` and so on. The newest ones stay, so that work which began with one can end with it, and no name ever gets
other values. A target is a model or a bank of this process, a folder that other processes read (which shares memory
where it is on a file system in memory), or `dvora serve`.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import torch
from torch import Tensor, nn

from .bank.adapters import as_bytes
from .bank.bank import AdapterBank
from .flat import Layout, vector_digest
from .peft.layer import layers_of
from .tensors import Float
from .whole_files import write_atomically

__all__ = [
    "AdapterVersion",
    "BankTarget",
    "FolderTarget",
    "ModelTarget",
    "Publisher",
    "ServerTarget",
    "Target",
    "newest",
    "vector_digest",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(rf"({_NAME.pattern})-v([1-9][0-9]{{0,17}})")
_SUFFIX = ".vector"


@dataclass(frozen=True, eq=False)
class AdapterVersion:
    """The values of an adapter at one moment of its training.

    Args:
        adapter: its name.
        number: of the version, from 1 on.
        layout: of the vector.
        vector: the values, on the CPU; nobody writes to it.
    """

    adapter: str
    number: int
    layout: Layout
    vector: Float[Tensor, "S"]

    @property
    def name(self) -> str:
        """Under which it is served."""
        return f"{self.adapter}-v{self.number}"

    @cached_property
    def digest(self) -> str:
        """`vector_digest` of its layout and values."""
        return vector_digest(self.layout.digest, as_bytes(self.vector))


class Target(Protocol):
    """Where versions are served: the ones below, or one of your own."""

    def names(self) -> Iterable[str]:
        """Of what it has, whoever put it there."""

    def put(self, version: AdapterVersion) -> None:
        """Serve a version under its name: all of it, or after an error nothing."""

    def drop(self, name: str) -> None:
        """Serve a version no longer, if it is there."""


class Publisher:
    """Publishes an adapter of a training model, version after version.

    Numbers go on after the newest version that the target has, so also after a restart of the trainer. A number whose
    `put` failed is not used again: its values may have arrived.

    Args:
        model: with the adapter. Under DistributedDataParallel one process publishes; sharded values are refused.
        target: where the versions go.
        name: of the adapter there: letters, digits, dots, hyphens and underscores. One publisher has it at a time.
        keep: how many of the newest versions stay, those whose `put` failed counted.
        adapter_name: of the adapter in the model.

    Raises:
        TypeError, ValueError: an argument is out of range, or there is no such adapter of DVoRA, or a scaled one.
    """

    def __init__(
        self, model: nn.Module, target: Target, name: str, *, keep: int = 2, adapter_name: str = "default"
    ) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"name must be letters, digits, dots, hyphens and underscores, at most 100, with a letter or a digit "
                f"first; got {name!r:.200}"
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be a positive integer, got {keep!r}")
        _check_strength(model, adapter_name)
        self.layout = Layout.of(model, adapter_name)
        """Of its vectors."""
        self._model, self._target, self._name, self._keep = model, target, name, keep
        self._numbers = _numbers(name, target.names())

    def publish(self) -> AdapterVersion:
        """Serve the adapter as it is now under a new name, and drop what is older than the newest versions.

        Raises:
            TypeError, ValueError: the adapter has another strength than one, its values are not all in this process,
                or the target refuses them.
            OSError: the target cannot be reached.
        """
        _check_strength(self._model, self.layout.adapter_name)
        number = self._numbers[-1] + 1 if self._numbers else 1
        version = AdapterVersion(self._name, number, self.layout, self.layout.to_vector(self._model).cpu())
        self._numbers.append(number)
        self._target.put(version)
        for old in self._numbers[: -self._keep]:
            self._target.drop(f"{self._name}-v{old}")
            self._numbers.remove(old)
        return version


def newest(adapter: str, names: Iterable[str]) -> str | None:
    """The name of an adapter's newest version among the names of a target; None if there is no version of it."""
    numbers = _numbers(adapter, names)
    return f"{adapter}-v{numbers[-1]}" if numbers else None


class ModelTarget:
    """An adapter of a model in this process, which has one version at a time: the last one that was put.

    Parameters stay the same objects, so compiled models keep working. Do not put while another thread runs the model.

    Args:
        model: adapted by PEFT, with the layout of what is put.
        adapter_name: of the adapter.

    Raises:
        TypeError, ValueError: there is no such adapter, or it has another strength than one.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        _check_strength(model, adapter_name)
        Layout.of(model, adapter_name)
        self._model, self._adapter_name = model, adapter_name
        self.name: str | None = None
        """Of the version that it has."""

    def names(self) -> list[str]:
        """The one version."""
        return [] if self.name is None else [self.name]

    def put(self, version: AdapterVersion) -> None:
        """Give the adapter the values of a version.

        Raises:
            TypeError, ValueError: the adapter has another layout, is merged, or has another strength than one.
        """
        _check_strength(self._model, self._adapter_name)
        Layout(version.layout.content, self._adapter_name).from_vector(version.vector, self._model)
        self.name = version.name

    def drop(self, name: str) -> None:
        """Nothing is left of a version that another one has replaced."""


class BankTarget:
    """An `AdapterBank` of this process; batches that run end with the version that they began with.

    Args:
        bank: that knows its layers: with an adapter in it, or made with `like`.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank

    def names(self) -> list[str]:
        """Of all adapters in the bank."""
        return list(self._bank)

    def put(self, version: AdapterVersion) -> None:
        """Add a version.

        Raises:
            ValueError: the bank has another layout, does not know its layers yet, or has the name.
        """
        if difference := self._bank.layout.content.difference(version.layout.content):
            raise ValueError(
                f"version {version.name!r} is no vector of the bank's layout: {difference}. Make bank and trainer with "
                "the same configuration on the same base"
            )
        # Before its first step an adapter changes nothing.
        self._bank.add(version.name, version.vector, allow_unchanged=True)

    def drop(self, name: str) -> None:
        """Remove a version."""
        if name in self._bank:
            self._bank.remove(name)


class FolderTarget:
    """A folder with a file for each version, which other processes read.

    On a file system in memory, such as /dev/shm, it is memory that the processes of a machine share; on a network those
    of several machines share it. A file appears whole: one line of JSON with layout and digest, then the values.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Of all versions."""
        return [file.name.removesuffix(_SUFFIX) for file in self._folder.glob(f"[!.]*{_SUFFIX}")]

    def put(self, version: AdapterVersion) -> None:
        """Write a version.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        head = json.dumps({"digest": version.digest, "layout": version.layout.to_dict()})
        write_atomically(self._file(version.name), head.encode() + b"\n" + as_bytes(version.vector))

    def drop(self, name: str) -> None:
        """Remove a version."""
        self._file(name).unlink(missing_ok=True)

    def read(self, name: str) -> AdapterVersion:
        """A version, to put into a model or a bank.

        Raises:
            FileNotFoundError: it is not there, or no longer.
            ValueError: its file is damaged, or is none of a version.
        """
        file = self._file(name)
        # Read at once: whoever opens it again may find it dropped.
        head, _, values = file.read_bytes().partition(b"\n")
        try:
            if (match := _VERSION.fullmatch(name)) is None:
                raise ValueError("the name is none of a version")
            settings = json.loads(head)
            layout, vector = (
                Layout.from_dict(settings["layout"]),
                torch.frombuffer(bytearray(values), dtype=torch.float32),
            )
            version = AdapterVersion(match[1], int(match[2]), layout, vector)
            if version.digest != settings["digest"]:
                raise ValueError(f"its digest is {version.digest}, and it says {settings['digest']!r:.100}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is no version of an adapter, or damaged: {error}; publish it again") from error
        return version

    def latest(self, adapter: str) -> AdapterVersion | None:
        """The newest version of an adapter; None if there is none yet.

        Raises:
            ValueError: its file is damaged.
        """
        while (name := newest(adapter, self.names())) is not None:
            # It may be dropped meanwhile; then there is a newer one.
            with suppress(FileNotFoundError):
                return self.read(name)
        return None

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"


class ServerTarget:
    """A `dvora serve`, which has at least one adapter of the layout already: save the untrained one for it.

    Texts that are being generated end with the version that they began with; every answer names its version in the
    header `x-dvora-adapter`. What was put is there again after a restart of the server.

    Args:
        address: such as http://localhost:8000.
        token: that the server was started with.
        timeout: seconds that an answer may take.
    """

    def __init__(self, address: str, token: str | None = None, *, timeout: float = 30.0) -> None:
        self._address, self._timeout = address.rstrip("/"), timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def names(self) -> list[str]:
        """Of all adapters of the server.

        Raises:
            OSError: it cannot be reached.
        """
        return [adapter["name"] for adapter in json.loads(self._ask("GET", ""))["adapters"]]

    def put(self, version: AdapterVersion) -> None:
        """Send a version; when this returns it is served.

        Raises:
            ValueError: the server refuses it, and says why: no token, another layout, no adapter to take settings of.
            OSError: it cannot be reached.
        """
        query = urlencode({"format": "vector", "layout": version.layout.digest, "digest": version.digest})
        self._ask("PUT", f"/{version.name}?{query}", as_bytes(version.vector).tobytes())

    def drop(self, name: str) -> None:
        """Have a version served no longer.

        Raises:
            ValueError: the server refuses it: no token.
            OSError: it cannot be reached.
        """
        self._ask("DELETE", f"/{name}", allowed=404)

    def _ask(self, method: str, path: str, data: bytes | None = None, *, allowed: int | None = None) -> bytes:
        """The body of an answer; of an error with the allowed status too."""
        request = urllib.request.Request(f"{self._address}/v1/adapters{path}", data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            said = error.read()
            if error.code == allowed:
                return said
            message = f"{self._address} refused {method} {path.partition('?')[0]} with {error.code}: {_message(said)}"
            raise (ValueError if error.code < 500 else OSError)(message) from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"no server answers at {self._address}: {error.reason}") from error


def _numbers(adapter: str, names: Iterable[str]) -> list[int]:
    """The versions of an adapter among the names, sorted."""
    matches = (_VERSION.fullmatch(name) for name in names)
    return sorted(int(match[2]) for match in matches if match is not None and match[1] == adapter)


def _check_strength(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that is scaled: its vector does not say so, and would be served unscaled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model with an adapter, got {model!r:.200}")
    for layer in layers_of(model, adapter_name):
        if (strength := float(layer.strength(adapter_name))) != 1:
            raise ValueError(
                f"model: adapter {adapter_name!r} has strength {strength:g} in {layer.name}, which a vector does not "
                f"carry; call set_strength(1.0, {adapter_name!r}) first"
            )


def _message(said: bytes) -> Any:
    """The message in an error's body, or the body."""
    try:
        return json.loads(said)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return said[:200]
