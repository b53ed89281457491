"""A folder of adapters as one file for the bank, and what is in such a file."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...bank.adapters import adapters_in
from ...bank.packs import FORMAT, OnProgress, Pack, write_pack
from ...peft.content import Content


@dataclass(frozen=True)
class PackInspection:
    """What a pack holds.

    Args:
        file: the pack.
        format: of it.
        count: of adapters.
        bytes: of the file.
        bytes_an_adapter: on average, with its part of the index.
        contents: for each kind of adapter in it: how many, their layers, ranks, and the names of what is saved whole.
        adapters: name, bytes and digest of each.
    """

    file: str
    format: str
    count: int
    bytes: int
    bytes_an_adapter: int
    contents: list[dict[str, Any]]
    adapters: list[dict[str, Any]]


def pack(folder: Path, output: Path, on_progress: OnProgress | None = None) -> PackInspection:
    """Write all adapters of a folder into one file, and look into it.

    Args:
        folder: with a folder for each adapter.
        output: the file; one of that name is replaced when everything is written.
        on_progress: called with how many adapters are done, of how many.

    Raises:
        ValueError: a folder holds no adapter of DVoRA or a damaged one.
        OSError: the file cannot be written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one with a folder for each adapter in it")
    write_pack(output, adapters_in(folder), on_progress)
    return inspect_pack(output)


def inspect_pack(file: Path) -> PackInspection:
    """What a pack holds; no values are read.

    Raises:
        ValueError: it is none, truncated or damaged.
    """
    with Pack.open(file) as opened:
        sources = [opened.source(name) for name in opened.entries]
    contents, size = Counter(source.content for source in sources), file.stat().st_size
    return PackInspection(
        str(file),
        FORMAT,
        len(sources),
        size,
        size // len(sources),
        [_in_short(content, count) for content, count in contents.items()],
        [{"name": each.name, "bytes": each.description.size, "digest": each.digest} for each in sources],
    )


def _in_short(content: Content, count: int) -> dict[str, Any]:
    return {
        "adapters": count,
        "layers": len(content.layers),
        "ranks": sorted({layer.rank for layer in content.layers}),
        "values": sum(sum(layer.lengths) for layer in content.layers) + sum(prod(each.shape) for each in content.whole),
        "saved_whole": [each.name for each in content.whole],
        "digest": content.digest,
    }
