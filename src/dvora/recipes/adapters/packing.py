"""A folder of adapters as one file for the bank, and what is in such a file."""

from collections import Counter
from pathlib import Path
from typing import Any

from ...adapter_file.packs import FORMAT, OnProgress, Pack, write_pack
from ...adapter_file.values import Description, adapters_in


def pack(folder: Path, output: Path, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Write all adapters of a folder, which has a folder for each, into one file, and look into it.

    Raises:
        ValueError: a folder holds no adapter of DVoRA or a damaged one.
        OSError: the file cannot be written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one with a folder for each adapter in it")
    write_pack(output, adapters_in(folder), on_progress)
    return inspect_pack(output)


def inspect_pack(file: Path) -> dict[str, Any]:
    """What a pack holds: its adapters, and of each kind layers, ranks, and what is saved whole; no values are read.

    Raises:
        ValueError: it is none, truncated or damaged.
    """
    with Pack.open(file) as opened:
        sources = [opened.source(name) for name in opened.entries]
    counts, size = Counter(source.content for source in sources), file.stat().st_size
    contents = {source.content: source.description for source in sources}
    return {
        "file": str(file),
        "format": FORMAT,
        "count": len(sources),
        "bytes": size,
        "bytes_an_adapter": size // len(sources),
        "contents": [_in_short(contents[content], count) for content, count in counts.items()],
        "adapters": [
            {"name": source.name, "bytes": source.description.size, "digest": source.digest} for source in sources
        ],
    }


def _in_short(description: Description, count: int) -> dict[str, Any]:
    content = description.content
    layers = content.layers or content.factors
    return {
        "adapters": count,
        "method": content.method,
        "layers": len(layers),
        "ranks": sorted({layer.rank for layer in layers}),
        "values": description.count,
        "saved_whole": [part.name for part in content.whole],
        "digest": content.digest,
    }
