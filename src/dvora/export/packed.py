"""An adapter as one vector that a graph takes, so that a runtime computes no norm.

Row factors of DVoRA's layers come first, then factors of LoRA's, then heads. What an adapter does not have is zero: of
one method the part of the other, and of LoRA the ranks above its own.

Dimensions: P values of a packed adapter, I in, O out, R the largest rank of LoRA in a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapter_file.content import Content, vector_digest
from ..adapter_file.values import FolderSource, is_finite
from ..adapter_file.values_file import as_bytes
from ..bank.factor_rows import FactorRows
from ..bank.served import ServedModel
from ..bank.slots import AdapterRow
from ..rows.low_rank import LowRank
from ..tensors import Float
from ..whole_files import write_atomically

FORMAT = "dvora-packed"
VERSION = 2
TENSOR = "adapter"
"""Of a file with a packed adapter, and of a graph's inputs."""
SUFFIX = ".safetensors"
LAYOUT = "layout.json"
NO_COMPUTATION = frozenset(
    ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")
)
"""What a configuration says beside what a model computes."""
PARTS = ("gain_minus_one", "scale", "lambda_d")
LORA_PARTS = ("lora_A.T", "lora_B.T")
"""With alpha / rank in the second one; transposed, as a graph multiplies by them."""


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

    @property
    def stop(self) -> int:
        """The first value behind it."""
        return self.offset + prod(self.shape)


class PackedAdapter(NamedTuple):
    """What a packed adapter's file has."""

    vector: Float[Tensor, "P"]
    labels: list[str]
    """Names of the classes, if it has some."""


def read_layout(folder: Path) -> dict[str, Any]:
    """What `layout.json` of an export says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    file = folder / LAYOUT
    try:
        layout: dict[str, Any] = json.loads(file.read_bytes())
        version = layout["format"], layout["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r:.200}; put the exported file there again") from error
    if version != (FORMAT, VERSION):
        raise ValueError(f"{file} is of {version}, expected {(FORMAT, VERSION)}; export the model again")
    return layout


def graph_file(folder: Path, layout: Mapping[str, Any], graph: str) -> Path:
    """A graph's file, once its content and that of its weights are what the layout names.

    Args:
        folder: of the export.
        layout: of `read_layout`.
        graph: one, table, files or one-int8.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no such graph, or a file is damaged.
    """
    if (about := layout["graphs"].get(graph)) is None:
        raise ValueError(f"graph: there is no {graph!r} in {folder}, but {', '.join(layout['graphs'])}")
    for expected in filter(None, (about, about.get("weights"))):
        if described(folder / expected["file"])["sha256"] != expected["sha256"]:
            raise ValueError(f"{folder / expected['file']} is damaged; put the exported file there again")
    return folder / str(about["file"])


def described(file: Path) -> dict[str, Any]:
    """A file as `layout.json` has it."""
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            hashed.update(part)
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": hashed.hexdigest()}


def read_packed(file: Path, layout: Mapping[str, Any]) -> PackedAdapter:
    """A packed adapter, checked.

    Args:
        file: in an export's `adapters/`, under the name that it was written with.
        layout: of `read_layout`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged or renamed, of another version or layout, or has values that are not finite.
    """
    try:
        with safe_open(file, "pt") as opened:
            about, vector = opened.metadata() or {}, opened.get_tensor(TENSOR)
        name = file.name.removesuffix(SUFFIX)
        for key, expected in _metadata(layout["digest"], name).items():
            if (actual := about.get(key)) != expected:
                raise ValueError(f"its {key} is {actual!r:.100}, expected {expected!r}; export it with this base")
        if vector.dtype != torch.float32 or vector.shape != (layout["size"],):
            raise ValueError(f"it has {vector.dtype} of shape {(*vector.shape,)}, expected float32 of {layout['size']}")
        if (digest := _digest(layout["digest"], name, about["labels"], vector)) != about.get("digest"):
            raise ValueError(f"its digest is {digest}, and it says {about.get('digest')!r:.100}")
        if not is_finite(vector):
            raise ValueError("some of its values are not finite")
        labels = json.loads(about["labels"])
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"its labels are {about['labels']!r:.100}, expected a list of texts")
        return PackedAdapter(vector, labels)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is no packed adapter of this export, or damaged: {error}") from error


def _metadata(layout_digest: str, name: str) -> dict[str, str]:
    """What a packed adapter says of itself beside its labels and its digest."""
    return {"format": FORMAT, "version": str(VERSION), "layout": layout_digest, "name": name}


def _digest(layout_digest: str, name: str, labels: str, vector: Float[Tensor, "P"]) -> str:
    """Of all that a packed adapter has."""
    return vector_digest(f"{layout_digest}\n{name}\n{labels}", as_bytes(vector))


class Packing:
    """How the adapters of a base model become vectors.

    Args:
        model: the base, without adapters.
        adapter: the folder of one of them, of DVoRA if there is one; the others of DVoRA have its layers and matrices,
            and all its sizes of heads.
        others: what others consist of: a vector has room for their factors of LoRA.

    Raises:
        TypeError, ValueError: it is no adapter of DVoRA or LoRA, damaged, or not of this base.
    """

    def __init__(self, model: nn.Module, adapter: Path, others: Sequence[Content] = ()) -> None:
        description = FolderSource(adapter).description
        lora = [sizes for content in (description.content, *others) for sizes in content.factors]
        by_rank = sorted(lora, key=lambda sizes: (sizes.name, sizes.rank))
        self.lora = {s.name: ((s.in_features, s.rank), (s.rank, s.out_features)) for s in by_rank}
        """Shapes of A^T and B^T by layer, of the largest rank that an adapter has there."""
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
        for name, of_layer in self.lora.items():
            shapes |= {f"{name}.{part}": shape for part, shape in zip(LORA_PARTS, of_layer, strict=True)}
        shapes |= {name: tuple(values.shape) for name, values in self.served.own_heads.items()}
        entries, offset = [], 0
        for name, shape in shapes.items():
            entries.append(Entry(name, offset, shape))
            offset = entries[-1].stop
        return entries

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The adapted layers by name."""
        by_vectors = {layer.name: layer.module for layer in self.served.layers}
        return {**by_vectors, **{name: self.served.linears[name] for name in self.lora}}

    @property
    def size(self) -> int:
        """Values of a packed adapter."""
        return self.entries[-1].stop

    @cached_property
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
            "base": self._base_digest(),
            "entries": [{"name": e.name, "offset": e.offset, "shape": list(e.shape)} for e in self.entries],
        }
        return {**layout, "digest": vector_digest(json.dumps(layout))}

    def _base_digest(self) -> str:
        """Of all that a graph has of the base: also of what no adapter changes, such as embeddings and activations."""
        model = self.served.model
        config = model.config.to_dict() if isinstance(model, PreTrainedModel) else {}
        computed = {key: value for key, value in config.items() if key not in NO_COMPUTATION}
        state = model.state_dict()
        parts = (
            part
            for name in sorted(state.keys() - self.served.own_heads)
            for part in (name.encode(), as_bytes(state[name]))
        )
        return vector_digest(json.dumps(computed, sort_keys=True, default=str), *parts)

    def null(self) -> Float[Tensor, "P"]:
        """The base itself, with its own heads."""
        return self._vector(self.rows.base())

    def pack(self, adapter: Path) -> Float[Tensor, "P"]:
        """An adapter as a vector.

        Raises:
            TypeError, ValueError: it is damaged, of another base, or has other layers or heads, or a larger rank.
        """
        source = FolderSource(adapter)
        self.served.check_fits(source.content, source.beside, source.config)
        for sizes in source.content.factors:
            if sizes.rank > (room := self.lora[sizes.name][1][0] if sizes.name in self.lora else 0):
                raise ValueError(
                    f"{adapter}: {sizes.name} has LoRA of rank {sizes.rank}, and vectors here have room for {room}; "
                    "export the adapters together"
                )
        values = source.read()
        row = self.rows.row(values, self.rows.of([values])[0])
        for name, head in row.held.heads.items():
            if head.shape != self.served.own_heads[name].shape:
                raise ValueError(
                    f"{adapter}: {name} has shape {tuple(head.shape)}, and a graph has one, "
                    f"{tuple(self.served.own_heads[name].shape)}; export adapters with as many classes together"
                )
        return self._vector(row)

    def write(self, file: Path, vector: Float[Tensor, "P"], labels: Sequence[str] = ()) -> dict[str, Any]:
        """Write a packed adapter as safetensors: what it is of, and its digest, stand in the metadata.

        Args:
            file: to write.
            vector: of `pack`.
            labels: names of the classes.

        Returns:
            What an index says of it: name, labels, digest, file, bytes.
        """
        layout, name, listed = self.layout["digest"], file.name.removesuffix(SUFFIX), json.dumps([*labels])
        digest = _digest(layout, name, listed, vector)
        about = {**_metadata(layout, name), "digest": digest, "labels": listed}
        write_atomically(file, content := save({TENSOR: vector}, about))
        return {"name": name, "labels": [*labels], "digest": digest, "file": file.name, "bytes": len(content)}

    def _vector(self, row: AdapterRow) -> Float[Tensor, "P"]:
        heads = (row.held.heads[name] for name in self.served.own_heads)
        parts = [row.factors, *self._filled(row.held.factors), *heads]
        return torch.cat([part.detach().to("cpu", torch.float32).reshape(-1) for part in parts])

    def _filled(self, factors: Mapping[str, LowRank]) -> Iterator[Tensor]:
        """A^T (I, R) and B^T (R, O) of every layer that has some in a vector."""
        for name, (of_A, of_B) in self.lora.items():
            A_T, B_T = torch.zeros(of_A), torch.zeros(of_B)
            if name in factors:
                A, B = factors[name]
                A_T[:, : len(A)], B_T[: len(A)] = A.T, B.T
            yield from (A_T, B_T)
