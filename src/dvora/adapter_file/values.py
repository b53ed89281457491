"""An adapter by itself: where it can be read (a folder, a vector), and its values, checked when they are read.

An adapter is two files: its settings (JSON), and its values (safetensors: a header, then the data). Adapters of one
recipe have the same settings and header, which are parsed once; reading one more is reading its data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..tensors import Float
from .content import Content, check_saved_ranks, in_order, vector_digest
from .lora import read_lora
from .settings import DVoRAConfig
from .values_file import (
    LARGEST_SETTINGS,
    SETTINGS,
    VALUES,
    VECTOR_PREFIX,
    Shape,
    as_bytes,
    check_not_pickled,
    check_size,
    data_size,
    header_entries,
    open_values,
    plain_key,
    read_header,
    tensors_of,
)

IN_RUN = "adapter"
"""Where a run of `dvora train` has its adapter."""
LARGEST_KEPT = 2**18
"""Bytes of settings and a header that stay in memory, parsed: those of some 2,000 tensors."""
_EXACT = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values float32 holds exactly."""


@dataclass(frozen=True, eq=False)
class Description:
    """What settings and the header of the values say of an adapter."""

    settings: bytes
    header: bytes
    config: DVoRAConfig
    content: Content
    entries: Mapping[str, tuple[torch.dtype, Shape]]
    """Of the data, by name in the file, as they follow one another."""
    names: Mapping[str, str]
    """Names in the file of what is the adapter's, by its name there, in the order of a vector."""
    beside: Mapping[str, Shape]
    """Shapes of what the file has besides the adapter, by the names in it."""
    dtype: torch.dtype | None
    """Of all entries; None where they have several."""
    strengths: tuple[float, ...]
    """One a layer."""
    factors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names in the file of the factors of an adapter of LoRA, by layer."""

    @cached_property
    def places(self) -> Mapping[str, range]:
        """Where the values of each entry stand among all values of the file, by name in the file."""
        counts = [prod(shape) for _, shape in self.entries.values()]
        ends = zip(self.entries, counts, accumulate(counts), strict=True)
        return {key: range(end - count, end) for key, count, end in ends}

    @cached_property
    def order(self) -> Tensor:
        """Where each value of the flat vector stands among all values of the file, (S,); made when there are values."""
        keys = [key for name, key in self.names.items() if VECTOR_PREFIX in name]
        return torch.cat([torch.arange(self.places[key].start, self.places[key].stop) for key in keys])

    def tensors(self, values: Tensor) -> dict[str, Tensor]:
        """Views of all values of the file, in their one dtype: what is no vector of a layer, by name in the file."""
        keys = [*self.beside, *(self.names[part.name] for part in self.content.whole)]
        return {key: values[self.places[key].start : self.places[key].stop].view(self.entries[key][1]) for key in keys}

    def digest(self, values: AdapterValues) -> str:
        """32 hexadecimal digits that name both files, byte for byte: the values have all that the data has."""
        return vector_digest(
            self.settings, self.header, values.digest.encode(), *(as_bytes(tensor) for tensor in values.beside.values())
        )

    @property
    def count(self) -> int:
        """Of the adapter's values."""
        return sum(prod(shape) for key, (_, shape) in self.entries.items() if key not in self.beside)

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return len(self.settings) + len(self.header) + self.data_size

    @cached_property
    def data_size(self) -> int:
        """Bytes behind the header."""
        return data_size(self.entries)


@dataclass(frozen=True, eq=False)
class AdapterValues:
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
    factors: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Those of an adapter of LoRA as its file has them, by layer."""

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that name what is served: content, strengths, and the values to the last bit."""
        tensors = [*self.whole.items(), *((name, factor) for name, of in self.factors.items() for factor in of)]
        whole = [part for name, t in tensors for part in (f"{name} {t.dtype} ".encode(), as_bytes(t))]
        return vector_digest(json.dumps([_digest(self.content), self.strengths]), as_bytes(self.vector), *whole)


class Source(Protocol):
    """Where the values of one adapter can be read."""

    @property
    def content(self) -> Content:
        """What the adapter consists of, known before its values are read."""

    @property
    def config(self) -> DVoRAConfig:
        """Its settings, shared with others."""

    @property
    def beside(self) -> Mapping[str, Shape]:
        """Shapes of what its file has besides the adapter."""

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
        with errors_of(folder):
            _check_files(folder)
            settings = (folder / SETTINGS).read_bytes()
            with open_values(folder / VALUES) as file:
                header, size = read_header(file)
            self.description = described(settings, header)
            check_size(self.description.data_size, size)
        description = self.description
        self.content, self.config, self.beside = description.content, description.config, description.beside

    def read(self) -> AdapterValues:
        """The values as they are now, from one reading of the files.

        Raises:
            ValueError: the folder has other settings, names or shapes than at first, changed while it was read, is
                gone, damaged, or has values that are not finite.
        """
        data = self.data()
        with errors_of(self.folder):
            return values_of(self.description, data)

    def data(self) -> bytes:
        """The data of the values, as they are now.

        Raises:
            ValueError: see `read`.
        """
        with errors_of(self.folder):
            before = _state(self.folder)
            _check_files(self.folder)
            settings, values = ((self.folder / name).read_bytes() for name in (SETTINGS, VALUES))
            if _state(self.folder) != before:
                raise ValueError("it changed while it was read; read it again when whoever writes to it is done")
            if settings != self.description.settings or not values.startswith(self.description.header):
                raise ValueError(
                    "it is another adapter than when it was added: its settings or entries differ; add it again"
                )
        return values[len(self.description.header) :]

    def tensors(self) -> dict[str, Tensor]:
        """All values of the adapter as they are now, in their own dtypes, by name in the order of a vector.

        Raises:
            ValueError: see `read`; whether they are finite is not looked at.
        """
        data = self.data()
        with errors_of(self.folder):
            tensors = tensors_of(self.description.entries, bytearray(data))
        return {name: tensors[key] for name, key in self.description.names.items()}


def of_dvora(folder: Path) -> FolderSource:
    """An adapter in a folder of its own or in a run of `dvora train`, which must be one of DVoRA.

    Raises:
        ValueError: it is of another method, or as for `FolderSource`.
    """
    in_run = folder / IN_RUN
    source = FolderSource(in_run if folder_of(folder) == in_run and (in_run / SETTINGS).is_file() else folder)
    if (method := source.content.method) != "dvora":
        raise ValueError(
            f"{folder}: it is an adapter of type {method.upper()}; only those of DVoRA have vectors. Merge it"
        )
    return source


class VectorSource:
    """An adapter as one flat vector, of which a copy is kept.

    Args:
        content: what the vector is of.
        config: of an adapter with this content.
        strengths: one a layer.
        vector: float32, in the order of `dvora.flat.Layout`, so also what is saved whole is in it.

    Raises:
        TypeError, ValueError: it is of another size or dtype, or not finite.
    """

    def __init__(
        self, content: Content, config: DVoRAConfig, strengths: tuple[float, ...], vector: Float[Tensor, "S"]
    ) -> None:
        if not content.layers:
            raise ValueError(f"vector: one of {content.method} has none, only adapters of DVoRA have; give a folder")
        self.content, self.config, self.beside = content, config, dict[str, Shape]()
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
        entries = dict(zip(shapes, parts, strict=True))
        heads = {part.name: entries.pop(part.name).view(part.shape) for part in content.whole}
        self._values = _finite(AdapterValues(content, torch.cat([*entries.values()]), strengths, heads, config, {}))

    def read(self) -> AdapterValues:
        """The values of the vector as it was given."""
        return self._values


def adapters_in(folder: Path) -> dict[str, Path]:
    """The adapters in a folder, by the names of the folders in it, sorted; hidden ones are unfinished and left out.

    A folder in it is an adapter, or a run of `dvora train` with the adapter in it.

    Raises:
        ValueError: there is none.
        OSError: it cannot be read.
    """
    visible = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    places = {path.name: folder_of(path) for path in visible}
    folders = {name: place for name, place in places.items() if (place / SETTINGS).is_file()}
    if not folders:
        advice = (
            "it is an adapter itself, name the folder around it" if (folder / SETTINGS).is_file() else "name another"
        )
        raise ValueError(f"{folder} has no folders with adapters in it ({SETTINGS} and {VALUES}); {advice}")
    return folders


def folder_of(path: Path) -> Path:
    """Where the adapter is in a folder of one or in a run of `dvora train`, if it is there."""
    return path if (path / SETTINGS).is_file() else path / IN_RUN


def described(settings: bytes, header: bytes) -> Description:
    """What an adapter is, parsed once for all adapters with the same settings and header, unless these are huge.

    Args:
        settings: the file of settings.
        header: the beginning of the file of values, with its length.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA, or damaged.
    """
    return (_kept if len(settings) + len(header) <= LARGEST_KEPT else _described)(settings, header)


def _described(settings: bytes, header: bytes) -> Description:
    entries = header_entries(header)
    shapes = {name: shape for name, (_, shape) in entries.items()}
    config = DVoRAConfig.from_bytes(settings, shapes)
    if not isinstance(config, DVoRAConfig):
        config, content, of_file = read_lora(settings, config, entries)
        return Description(settings, header, config, content, entries, of_file.whole, {}, None, (), of_file.factors)
    check_saved_ranks(config, shapes)
    content = Content.of_saved(config, shapes)
    if not content.layers:
        raise ValueError(f"{VALUES} has no vectors of any layer; save the adapter again")
    names = in_order({name: name for name in entries}, config)
    beside = {name: shape for name, shape in shapes.items() if plain_key(name) not in names}
    if len(names) + len(beside) != len(entries):
        raise ValueError(f"{VALUES} has two entries of one name, with and without a compiler's prefixes; keep one")
    if {name: entries[key][1] for name, key in names.items()} != _shapes(content):
        raise ValueError(f"{VALUES} is damaged: its tensors are not those of its settings; save the adapter again")
    dtypes = {dtype for dtype, _ in entries.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    strengths = tuple(config.strength_of(layer.name) for layer in content.layers)
    return Description(settings, header, config, content, entries, names, beside, dtype, strengths)


_kept = lru_cache(maxsize=64)(_described)


def values_of(description: Description, data: bytes) -> AdapterValues:
    """The values of an adapter, checked.

    Args:
        description: of its settings and header.
        data: behind the header.

    Raises:
        TypeError, ValueError: the data is cut off, or an entry is wider than float32 or not finite.
    """
    check_size(description.data_size, len(data))
    check_exact(description)
    content, buffer = description.content, bytearray(data)
    if description.factors:
        parts = tensors_of(description.entries, buffer)
        factors = {name: tuple(parts[key] for key in keys) for name, keys in description.factors.items()}
        heads = {name: parts[key] for name, key in description.names.items()}
        return _finite(AdapterValues(content, torch.empty(0), (), heads, description.config, {}, factors))
    # Most files have one dtype, and hundreds of entries, which need no view each then.
    if description.dtype is None:
        parts = tensors_of(description.entries, buffer)
        values = torch.cat([part.float().view(-1) for part in parts.values()])
    else:
        values = torch.frombuffer(buffer, dtype=description.dtype)
        parts, values = description.tensors(values), values.float()
    vector = values.index_select(0, description.order)
    heads = {part.name: parts[description.names[part.name]] for part in content.whole}
    beside = {key: parts[key] for key in description.beside}
    return _finite(AdapterValues(content, vector, description.strengths, heads, description.config, beside))


def check_exact(description: Description) -> None:
    """Refuse values that float32 does not hold exactly.

    Raises:
        TypeError: some are none.
    """
    factors = {key: key for of_layer in description.factors.values() for key in of_layer}
    for name, key in {**description.names, **factors}.items():
        if (dtype := description.entries[key][0]) not in _EXACT:
            raise TypeError(f"{name} is {dtype}, expected torch.float32 or half precision; save it as that")


@contextmanager
def errors_of(where: object) -> Iterator[None]:
    """Around what reads an adapter: its errors become ValueErrors that begin with where it was."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{where}: {error.filename} is no longer there") from error
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{where}: {str(error).removeprefix('source: ')}") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite: the extremes are, in one pass; NaN is both of them."""
    return not tensor.numel() or all(extreme.isfinite() for extreme in tensor.aminmax())


def _finite(values: AdapterValues) -> AdapterValues:
    """Values that are all finite."""
    for name, factors in values.factors.items():
        if not all(map(is_finite, factors)):
            raise ValueError(f"{name} has factors that are not finite; they are damaged, or training diverged")
    if not all(map(is_finite, (values.vector, *values.whole.values()))):
        shapes = _shapes(values.content)
        vectors = [name for name in shapes if name not in values.whole]
        parts = dict(zip(vectors, values.vector.split([prod(shapes[name]) for name in vectors]), strict=True))
        name = next(name for name, tensor in {**parts, **values.whole}.items() if not tensor.isfinite().all())
        raise ValueError(f"{name} has values that are not finite; they are damaged, or training diverged")
    return values


@lru_cache(maxsize=8)
def _digest(content: Content) -> str:
    return content.digest


@lru_cache(maxsize=8)
def _shapes(content: Content) -> dict[str, Shape]:
    """Of all entries by name, in the order of a vector."""
    vectors: dict[str, Shape] = {
        f"{layer.name}{VECTOR_PREFIX}{vector}": shape
        for layer in content.layers
        for vector, shape in layer.shapes.items()
    }
    return {**vectors, **{part.name: part.shape for part in content.whole}}


def _check_files(folder: Path) -> None:
    """Refuse a folder without both files of an adapter, or with settings that are too large."""
    check_not_pickled(folder)
    for name in (SETTINGS, VALUES):
        if not (folder / name).is_file():
            raise ValueError(f"there is no file {name}, so it is no folder with a saved adapter")
    if (size := (folder / SETTINGS).stat().st_size) > LARGEST_SETTINGS:
        raise ValueError(f"{SETTINGS} has {size:,} bytes, expected at most {LARGEST_SETTINGS:,}")


def _state(folder: Path) -> list[tuple[int, int, int]]:
    """What changes when one of the files is written, or another takes its place."""
    states: list[os.stat_result] = [(folder / name).stat() for name in (SETTINGS, VALUES)]
    return [(state.st_size, state.st_mtime_ns, state.st_ino) for state in states]
