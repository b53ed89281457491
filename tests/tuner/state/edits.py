"""One named edit of an adapter's folder, and the edits of bytes that several lists of them use."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """One edit of a sound folder."""

    family: str
    name: str
    apply: Callable[[Path], object]


def rewrite(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Replace the content of a file."""
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


def flipped(data: bytes, bit: int) -> bytes:
    """With one bit changed."""
    position = bit // 8
    return data[:position] + bytes([data[position] ^ 1 << bit % 8]) + data[position + 1 :]
