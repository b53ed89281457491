"""Where a bank's adapters come from: what each is, known at once, and its values, checked, when they are needed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..functional import Vectors
from ..peft.config import DVoRAConfig, Shape
from ..peft.content import Content
from ..peft.saving import VECTOR_PREFIX
from ..tensors import Float
from .saved import SETTINGS, VALUES, AdapterFiles, described_in, told_of

_EXACT = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values float32 holds exactly."""


class AdapterValues(NamedTuple):
    """The values of one adapter, on the CPU, checked; nobody writes to them."""

    content: Content
    vector: Float[Tensor, "S"]
    """float32: magnitude, lambda_b and lambda_d of the layers in the order of `content.layers`."""
    strengths: tuple[float, ...]
    """One a layer."""
    whole: Mapping[str, Tensor]
    """What is saved whole (heads, biases, tokens), in its own dtype, by the names of `content.whole`."""
    config: DVoRAConfig
    """Shared by adapters with equal settings."""
    beside: Mapping[str, Tensor]
    """What a file has that is not the adapter's (tables and biases of the base, projections), by the names in it."""

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that name what is served: content, strengths, and the values to the last bit."""
        found = hashlib.sha256(json.dumps([self.content.digest, self.strengths]).encode())
        found.update(as_bytes(self.vector))
        for name, tensor in self.whole.items():
            found.update(f"{name} {tensor.dtype} ".encode())
            found.update(as_bytes(tensor))
        return found.hexdigest()[:32]


class Source(Protocol):
    """Where the values of one adapter can be read."""

    @property
    def content(self) -> Content:
        """What the adapter consists of, known before its values are read."""

    def read(self) -> AdapterValues:
        """The values as they are now.

        Raises:
            ValueError: they are damaged, not finite, or of another content.
        """


class FolderSource:
    """An adapter in a folder, as `save_pretrained` writes it; at first only settings and the header are read.

    Raises:
        ValueError: there is no adapter of DVoRA in it, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with told_of(folder):
            settings, found = described_in(folder)
        self.content = found.content
        self._settings = hashlib.sha256(settings).digest()

    def read(self) -> AdapterValues:
        """The values as they are now, from one reading of the files.

        Raises:
            ValueError: the folder has other settings, names or shapes than at first, changed while it was read, is
                gone, damaged, or has values that are not finite.
        """
        return self.values_in(self.files())

    def files(self) -> AdapterFiles:
        """The bytes of both files, which belong together.

        Raises:
            ValueError: see `read`.
        """
        with told_of(self.folder):
            files = AdapterFiles.of(self.folder)
            difference = self.content.difference(files.described().content)
            if not difference and hashlib.sha256(files.settings).digest() != self._settings:
                difference = f"{SETTINGS} has other settings"
            if difference:
                raise ValueError(f"it is another adapter than when it was added: {difference}; add it again")
        return files

    def values_in(self, files: AdapterFiles) -> AdapterValues:
        """The values in files of this folder.

        Raises:
            ValueError: see `read`.
        """
        with told_of(self.folder):
            return values_in(files)


class VectorSource:
    """An adapter as one flat vector, of which a copy is kept.

    Args:
        content: what the vector is of.
        config: whose strengths are used.
        vector: float32, in the order of `dvora.flat.Layout`, so also what is saved whole is in it.

    Raises:
        TypeError, ValueError: it is of another size or dtype, or not finite.
    """

    def __init__(self, content: Content, config: DVoRAConfig, vector: Float[Tensor, "S"]) -> None:
        self.content = content
        if not isinstance(vector, Tensor) or vector.dtype != torch.float32:
            got = vector.dtype if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"vector is {got}, expected a tensor of torch.float32: half precision rounds a magnitude")
        shapes = _shapes(content)
        lengths = [prod(shape) for shape in shapes.values()]
        if vector.shape != (sum(lengths),):
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}, expected ({sum(lengths)},); was it made with another layout?"
            )
        parts = vector.detach().to("cpu", copy=True).split(lengths)
        entries = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        self._values = _checked(content, config, entries, {})

    def read(self) -> AdapterValues:
        """The values of the vector as it was given."""
        return self._values


def adapters_in(folder: Path) -> dict[str, Path]:
    """The folders in a folder that hold an adapter, sorted by name; hidden ones, which are unfinished, are left out.

    Raises:
        ValueError: there is none.
        OSError: it cannot be read.
    """
    found = [each for each in sorted(folder.iterdir()) if (each / SETTINGS).is_file() and not each.name.startswith(".")]
    if not found:
        advice = (
            "it is an adapter itself, name the folder around it" if (folder / SETTINGS).is_file() else "name another"
        )
        raise ValueError(f"{folder} has no folders with adapters in it ({SETTINGS} and {VALUES}); {advice}")
    return {each.name: each for each in found}


def values_in(files: AdapterFiles) -> AdapterValues:
    """The values in the files of a saved adapter, checked.

    Raises:
        TypeError, ValueError, SafetensorError: a file is damaged, or an entry is wider than float32 or not finite.
    """
    found, (own, beside) = files.described(), files.tensors()
    return _checked(found.content, found.config, own, beside)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied if it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _checked(
    content: Content, config: DVoRAConfig, entries: Mapping[str, Tensor], beside: Mapping[str, Tensor]
) -> AdapterValues:
    """Values whose every entry is what it is to be."""
    if {name: tuple(tensor.shape) for name, tensor in entries.items()} != _shapes(content):
        raise ValueError(f"{VALUES} is damaged: its tensors are not those of its header; save the adapter again")
    for name, tensor in entries.items():
        if tensor.dtype not in _EXACT:
            raise TypeError(f"{name} is {tensor.dtype}, expected torch.float32 or half precision; save it as that")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; they are damaged, or training diverged")
    whole = {each.name: entries[each.name] for each in content.whole}
    vector = torch.cat([tensor.float() for name, tensor in entries.items() if name not in whole])
    strengths = tuple(config.strength_of(layer.name) for layer in content.layers)
    return AdapterValues(content, vector, strengths, whole, config, beside)


def _shapes(content: Content) -> dict[str, Shape]:
    """Of all entries by name, in the order of a vector."""
    vectors: dict[str, Shape] = {
        f"{layer.name}{VECTOR_PREFIX}{vector}": (length,)
        for layer in content.layers
        for vector, length in zip(Vectors._fields, layer.lengths, strict=True)
        if length
    }
    return {**vectors, **{each.name: each.shape for each in content.whole}}
