"""From a training model to where its adapter is served: one flat vector a version, whole or not at all.

A `Publisher` takes the vector of an adapter and puts it into a target under a name of its own: `policy-v1`, then
`policy-v2` and so on. The newest ones stay, so that work which began with one can end with it, and a name that is
there never gets other values. A target is a model or a bank of this process, or a folder that other processes read
(which shares memory where it is on a file system in memory).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter_file.content import vector_digest
from .adapter_file.values_file import LARGEST_SETTINGS, as_bytes
from .bank.bank import AdapterBank
from .flat import Layout
from .peft.layer import layers_of
from .tensors import Float
from .whole_files import RANDOM, locked, write_atomically

__all__ = [
    "AdapterVersion",
    "BankTarget",
    "FolderTarget",
    "ModelTarget",
    "Publisher",
    "Target",
    "newest",
    "vector_digest",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(rf"({_NAME.pattern})-v([1-9][0-9]{{0,17}})")
_SUFFIX = ".vector"
_UNFINISHED = re.compile(rf"\.{_VERSION.pattern}\{_SUFFIX}\.{RANDOM}")
"""What a publisher leaves in a folder that is killed while it writes."""
WAITING_SECONDS = 30.0
"""For which a version waits until others are written to its folder."""


@dataclass(frozen=True, eq=False)
class AdapterVersion:
    """The values of an adapter at one moment of its training, checked when it is made, so before anything is written.

    Args:
        adapter: its name.
        number: of the version, from 1 on.
        layout: of the vector.
        vector: the values, on the CPU; nobody writes to it.

    Raises:
        TypeError, ValueError: the name is none, or the vector is of another size or dtype, or not finite.
    """

    adapter: str
    number: int
    layout: Layout
    vector: Float[Tensor, "S"]

    def __post_init__(self) -> None:
        _check_version(self.name)
        self.layout.check_vector(self.vector)

    @property
    def name(self) -> str:
        """Under which it is served."""
        return f"{self.adapter}-v{self.number}"

    @property
    def digest(self) -> str:
        """`vector_digest` of its layout and values as they are now."""
        return vector_digest(self.layout.digest, as_bytes(self.vector))


class Target(Protocol):
    """Where versions are served: the ones below, or one of your own."""

    def names(self) -> Iterable[str]:
        """Of what it has, whoever put it there, also of what is damaged."""

    def serves(self, name: str) -> bool:
        """Whether it has a version of this name that is whole."""

    def put(self, version: AdapterVersion) -> None:
        """Serve a version under its name: all of it, or after an error nothing.

        Raises:
            ValueError: it has the name with another content; a version that it has already it takes again.
        """

    def drop(self, name: str) -> None:
        """Serve a version no longer, if it is there."""


class Publisher:
    """Publishes an adapter of a training model, version after version.

    Numbers go on after the newest version that the target has, also after a restart of the trainer. A number whose
    `put` failed is not used again: its values may have arrived.

    Args:
        model: with the adapter. Under DistributedDataParallel one process publishes; sharded values are refused.
        target: where the versions go.
        name: of the adapter there: letters, digits, dots, hyphens and underscores. One publisher has it at a time.
        keep: how many of the newest versions stay; what is damaged or did not arrive does not count.
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
        self._newest = max(_numbers(name, target.names()), default=0)
        """Number that was used or seen."""
        self._served: set[int] = set()
        """Numbers that are known to be served."""

    def publish(self) -> AdapterVersion:
        """Serve the adapter as it is now under a new name, and drop what is older than the newest versions.

        Raises:
            TypeError, ValueError: the adapter has another strength than one, its values are not finite or not all in
                this process, or the target refuses them.
            OSError: the target cannot be reached.
        """
        _check_strength(self._model, self.layout.adapter_name)
        before = _numbers(self._name, self._target.names())
        number = max([self._newest, *before]) + 1
        version = AdapterVersion(self._name, number, self.layout, self.layout.to_vector(self._model).cpu())
        self._newest = number
        self._target.put(version)
        self._served.add(number)
        count = 1
        for old in reversed(before):
            name = f"{self._name}-v{old}"
            if count == self._keep:
                self._target.drop(name)
                self._served.discard(old)
            elif old in self._served or self._target.serves(name):
                self._served.add(old)
                count += 1
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
        self._digest: str | None = None

    def names(self) -> list[str]:
        """The one version."""
        return [] if self.name is None else [self.name]

    def serves(self, name: str) -> bool:
        """Whether it is the one version."""
        return name == self.name

    def put(self, version: AdapterVersion) -> None:
        """Give the adapter the values of a version.

        Raises:
            TypeError, ValueError: the adapter has another layout, is merged, or has another strength than one, or
                other values had the name.
        """
        _check_strength(self._model, self._adapter_name)
        if version.name == self.name and version.digest != self._digest:
            raise _taken(version.name, "the model")
        Layout(version.layout.content, self._adapter_name).from_vector(version.vector, self._model)
        self.name, self._digest = version.name, version.digest

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

    def serves(self, name: str) -> bool:
        """Whether there is an adapter of this name."""
        return name in self._bank

    def put(self, version: AdapterVersion) -> None:
        """Add a version.

        Raises:
            ValueError: the bank has another layout, does not know its layers yet, or has the name with other values.
        """
        if difference := self._bank.layout.content.difference(version.layout.content):
            raise ValueError(
                f"version {version.name!r} is no vector of the bank's layout: {difference}. Make bank and trainer with "
                "the same configuration on the same base"
            )
        if version.name not in self._bank:
            # Before its first step an adapter changes nothing.
            self._bank.add(version.name, version.vector, allow_unchanged=True)
        elif self._bank.digest(version.name) != self._bank.digest_of(version.vector):
            raise _taken(version.name, "the bank")

    def drop(self, name: str) -> None:
        """Remove a version."""
        if name in self._bank:
            self._bank.remove(name)


class FolderTarget:
    """A folder with a file for each version, which other processes read.

    On a file system in memory, such as /dev/shm, it is memory that the processes of a machine share; on a network those
    of several machines share it. A file appears whole: one line of JSON with name, layout and a digest of all, then the
    values. Publishers write one after another, each while it holds a lock, for which the file system must have locks.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Of all versions, also of damaged ones."""
        names = (file.name.removesuffix(_SUFFIX) for file in self._folder.glob(f"*{_SUFFIX}"))
        return [name for name in names if _VERSION.fullmatch(name)]

    def serves(self, name: str) -> bool:
        """Whether there is a version of this name that can be read."""
        try:
            self.read(name)
        except (OSError, ValueError):
            return False
        return True

    def put(self, version: AdapterVersion) -> None:
        """Write a version, and remove what killed publishers left.

        Raises:
            OSError: it cannot be written, and nothing of it is left; others write all the time.
            ValueError: its name is there with another content, or damaged, or its values are not finite any more.
        """
        # As it is now, checked again: its values may have changed since it was made.
        version = replace(version, vector=version.vector.clone())
        head, values = {"name": version.name, "layout": version.layout.to_dict()}, as_bytes(version.vector)
        head["digest"] = _digest_of_file(head, values)
        busy = TimeoutError(
            f"{self._folder}: another publisher has held the lock for {WAITING_SECONDS:g} seconds; look whether it "
            "hangs, or publish to another folder"
        )
        with locked(self._folder / ".lock", WAITING_SECONDS, busy=busy):
            for file in self._folder.iterdir():
                if _UNFINISHED.fullmatch(file.name) and file.is_file():
                    file.unlink()
            try:
                there = self.read(version.name)
            except FileNotFoundError:
                write_atomically(self._file(version.name), json.dumps(head).encode() + b"\n" + values)
            else:
                if (there.layout, there.digest) != (version.layout, version.digest):
                    raise _taken(version.name, self._folder)

    def drop(self, name: str) -> None:
        """Remove a version. A folder of its name, which no publisher makes, stays."""
        file = self._file(name)
        if file.is_symlink() or not file.is_dir():
            file.unlink(missing_ok=True)

    def read(self, name: str) -> AdapterVersion:
        """A version, to put into a model or a bank.

        Raises:
            FileNotFoundError: it is not there, or no longer.
            ValueError: its file is damaged, or is none of a version.
        """
        file = self._file(name)
        try:
            if not stat.S_ISREG(file.lstat().st_mode):
                raise ValueError("it is a link, a folder, a pipe or a device, which no publisher makes")
            # Once: whoever opens it again may find it dropped.
            with file.open("rb") as opened:
                head = opened.readline(LARGEST_SETTINGS)
                settings = json.loads(head)
                if settings["name"] != name:
                    raise ValueError(f"it is {settings['name']!r:.120}, copied or renamed")
                layout = Layout.from_dict(settings["layout"])
                size, expected = os.fstat(opened.fileno()).st_size, len(head) + 4 * layout.size
                if size != expected:
                    raise ValueError(f"it has {size:,} bytes, expected {expected:,}")
                values = torch.frombuffer(bytearray(opened.read(4 * layout.size)), dtype=torch.float32)
            adapter, _, number = name.rpartition("-v")
            version = AdapterVersion(adapter, int(number), layout, values)
            said = settings.pop("digest")
            if (digest := _digest_of_file(settings, as_bytes(values))) != said:
                raise ValueError(f"its digest is {digest}, and it says {said!r:.100}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{file} is no version of an adapter, or damaged: {error!s:.300}; remove it, and publish again"
            ) from error
        return version

    def latest(self, adapter: str) -> AdapterVersion | None:
        """The newest version of an adapter; None if there is none yet.

        Raises:
            ValueError: its file is damaged.
            OSError: its file cannot be read.
        """
        missing = None
        while (name := newest(adapter, self.names())) is not None:
            try:
                return self.read(name)
            except FileNotFoundError:
                # Dropped since it was listed: then there is a newer one.
                if name == missing:
                    raise
                missing = name
        return None

    def _file(self, name: str) -> Path:
        _check_version(name)
        return self._folder / f"{name}{_SUFFIX}"


def _numbers(adapter: str, names: Iterable[str]) -> list[int]:
    """The versions of an adapter among the names, sorted."""
    matches = (_VERSION.fullmatch(name) for name in names)
    return sorted(int(match[2]) for match in matches if match is not None and match[1] == adapter)


def _check_version(name: str) -> None:
    """Refuse what names no version, such as a path out of a folder."""
    if not _VERSION.fullmatch(name):
        raise ValueError(f"{name!r:.200} names no version of an adapter; expected such as 'policy-v1'")


def _digest_of_file(head: dict[str, Any], values: memoryview) -> str:
    """Of the values and all that the head says: name and layout, with its base."""
    return vector_digest(json.dumps(head, sort_keys=True), values)


def _taken(name: str, where: object) -> ValueError:
    return ValueError(
        f"{where} has {name!r} with another content, and a name never gets other values: another publisher uses it. "
        "Give each publisher a name of its own; publishing again takes the next number"
    )


def _check_strength(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that is scaled: its vector does not say so, and would be served unscaled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model with an adapter, got {model!r:.200}")
    for layer in layers_of(model, adapter_name):
        if (strength := layer.strength(adapter_name)) != 1:
            raise ValueError(
                f"model: adapter {adapter_name!r} has strength {strength:g} in {layer.name}, which a vector does not "
                f"carry; call set_strength(1.0, {adapter_name!r}) first"
            )
