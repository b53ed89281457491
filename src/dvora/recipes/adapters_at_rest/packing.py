"""A folder of adapters as one file for the bank, the way back, and what is in such a file."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...bank.pack import OnProgress, Pack, Rows, write_pack
from ...bank.pack_index import FORMAT_VERSION
from ...bank.saved import described_in, told_of
from ...bank.sources import adapters_in
from ...peft.content import Content
from ..models.adapter_folder import read_adapter
from ..models.adapters import base_class, of_base
from ..models.architectures import load_base
from ..models.hub import NOTHING

DTYPES = ("float32", "float16", "bfloat16")
"""Of rows of factors."""


@dataclass(frozen=True)
class PackInspection:
    """What a pack holds.

    Args:
        file: the pack.
        format_version: of it.
        count: of adapters.
        bytes: of the file.
        bytes_an_adapter: on average, with its part of the index.
        factors: the key of the base, dtypes and sizes of the rows that were computed for it; None without rows.
        contents: for each kind of adapter in it: how many, their layers, ranks, and the names of what is saved whole.
        adapters: name, bytes and digest of each.
    """

    file: str
    format_version: str
    count: int
    bytes: int
    bytes_an_adapter: int
    factors: dict[str, Any] | None
    contents: list[dict[str, Any]]
    adapters: list[dict[str, Any]]


def pack(
    folder: Path,
    output: Path,
    model: str | None = None,
    dtype: str = "float16",
    on_progress: OnProgress | None = None,
) -> PackInspection:
    """Write all adapters of a folder into one file, and look into it.

    Args:
        folder: with a folder for each adapter.
        output: the file; one of that name is replaced when everything is written.
        model: a base, a folder or a name on the hub, for which the rows of factors are put in; None: no rows.
        dtype: of these: "float32", "float16" or "bfloat16".
        on_progress: called with how many adapters are done, of how many.

    Raises:
        ValueError: a folder holds no adapter of DVoRA or a damaged one, or does not fit the base.
        OSError: the file cannot be written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one with a folder for each adapter in it")
    folders = adapters_in(folder)
    rows = None if model is None else _rows(next(iter(folders.values())), model, getattr(torch, dtype))
    write_pack(output, folders, rows, on_progress)
    return inspect_pack(output)


def inspect_pack(file: Path) -> PackInspection:
    """What a pack holds; no values are read.

    Raises:
        ValueError: it is none, truncated or damaged.
    """
    with Pack.open(file) as opened:
        rows, entries = opened.index
        contents = Counter(opened.source(name).content for name in opened.names)
    size = file.stat().st_size
    return PackInspection(
        str(file),
        FORMAT_VERSION,
        len(entries),
        size,
        size // len(entries),
        None if rows is None else rows._asdict(),
        [_in_short(content, count) for content, count in contents.items()],
        [{"name": entry.name, "bytes": entry.size, "digest": entry.digest} for entry in entries],
    )


def _rows(folder: Path, model: str, dtype: torch.dtype) -> Rows:
    """What makes rows for a base, with the head that an adapter brings."""
    from ...bank.factors import FactorRows

    with told_of(folder):
        found = described_in(folder)[1]
    adapter, trust = read_adapter(folder), of_base(model, NOTHING)
    base = load_base(model, *base_class(adapter, model, trust), trust=trust)
    return FactorRows.of_model(base, found.config, found.content, dtype)


def _in_short(content: Content, count: int) -> dict[str, Any]:
    return {
        "adapters": count,
        "layers": len(content.layers),
        "ranks": sorted({layer.rank for layer in content.layers}),
        "values": sum(sum(layer.lengths) for layer in content.layers) + sum(prod(each.shape) for each in content.whole),
        "saved_whole": [each.name for each in content.whole],
        "digest": content.digest,
    }
