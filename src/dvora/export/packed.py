"""An adapter as one vector that a graph takes: row factors of all layers, then heads; so a runtime computes no norm.

Dimensions: P values of a packed adapter, F of its row factors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..bank.adapters import FolderSource
from ..bank.factor_rows import FactorRows
from ..bank.served import ServedModel
from ..tensors import Float
from ..whole_files import write_atomically

FORMAT = "dvora-packed"
VERSION = 1
TENSOR = "adapter"
"""Of a file with a packed adapter, and of a graph's inputs."""
PARTS = ("gain_minus_one", "scale", "lambda_d")


@dataclass(frozen=True)
class Entry:
    """Where one part of an adapter stands.

    Args:
        name: of the layer and what it is of it, or of a parameter of a head.
        offset: in values.
        shape: of the part.
    """

    name: str
    offset: int
    shape: tuple[int, ...]


class Packing:
    """How the adapters of a base model become vectors.

    Args:
        model: the base, without adapters.
        adapter: the folder of one of them; the others have its layers, matrices and sizes of heads.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA, damaged, or not of this base.
    """

    def __init__(self, model: nn.Module, adapter: Path) -> None:
        description = FolderSource(adapter).description
        self.served = ServedModel(model, description.config, description.content)
        if table := next((head.name for head in self.served.heads if isinstance(head.module, nn.Embedding)), None):
            raise ValueError(
                f"it saves the embeddings {table} whole, which would be most of every vector; merge it, or train "
                "without them"
            )
        self.rows = FactorRows(self.served, torch.float32)

    @cached_property
    def entries(self) -> list[Entry]:
        """All parts in their order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, place in zip(self.served.layers, self.rows.places, strict=True):
            shapes |= {f"{layer.name}.{part}": (n,) for part, n in zip(PARTS, place.lengths, strict=True)}
        shapes |= {name: tuple(values.shape) for name, values in self.served.own_heads.items()}
        entries, offset = [], 0
        for name, shape in shapes.items():
            entries.append(Entry(name, offset, shape))
            offset += prod(shape)
        return entries

    @property
    def size(self) -> int:
        """Values of a packed adapter."""
        return self.entries[-1].offset + prod(self.entries[-1].shape)

    def layout(self) -> dict[str, Any]:
        """What `layout.json` has: what each value means, and of which base; the digest names all of it."""
        content = self.served.content
        settings = dict(zip(content.settings._fields, content.settings, strict=True))
        layout = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": "float32",
            "size": self.size,
            "settings": settings,
            "base": hashlib.sha256(json.dumps(content.base).encode()).hexdigest()[:32],
            "entries": [{"name": e.name, "offset": e.offset, "shape": list(e.shape)} for e in self.entries],
        }
        return {**layout, "digest": hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:32]}

    def null(self) -> Float[Tensor, "P"]:
        """The base itself, with its own heads."""
        return self._vector(self.rows.base().factors, self.served.own_heads)

    def pack(self, adapter: Path) -> Float[Tensor, "P"]:
        """An adapter as a vector.

        Raises:
            TypeError, ValueError: it is damaged, of another base, or has other layers or sizes of heads.
        """
        source = FolderSource(adapter)
        self.served.check_fits(source.content, source.beside)
        values = source.read()
        row = self.rows.row(values, self.rows.of([values])[0])
        for name, head in row.heads.items():
            if head.shape != self.served.own_heads[name].shape:
                raise ValueError(
                    f"{adapter}: {name} has shape {tuple(head.shape)}, and a graph has one, "
                    f"{tuple(self.served.own_heads[name].shape)}; export adapters with as many classes together"
                )
        return self._vector(row.factors, row.heads)

    def write(self, file: Path, vector: Float[Tensor, "P"], labels: Sequence[str] = ()) -> None:
        """Write a packed adapter as safetensors: what it is of stands in the metadata.

        Args:
            file: to write.
            vector: of `pack`.
            labels: names of the classes.
        """
        metadata = {"format": FORMAT, "layout": self.layout()["digest"], "labels": json.dumps([*labels])}
        write_atomically(file, save({TENSOR: vector}, metadata))

    def _vector(self, factors: Float[Tensor, "F"], heads: Mapping[str, Tensor]) -> Float[Tensor, "P"]:
        parts = [factors, *(heads[name] for name in self.served.own_heads)]
        return torch.cat([part.detach().to("cpu", torch.float32).reshape(-1) for part in parts])
