"""Images from elsewhere: files of a few known formats, of a size that can be read."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dvora.recipes.data.images import image_key, opened_image


def pipe(path: Path) -> None:
    os.mkfifo(path)


def postscript(path: Path) -> None:
    """Pillow starts Ghostscript to read it."""
    Image.new("RGB", (8, 8)).save(path, "EPS")


def bomb(path: Path) -> None:
    """Half a gigabyte in a few hundred bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("make", "message"),
    [(pipe, "is a pipe or a device"), (postscript, "is no image that can be read"), (bomb, "has too many points")],
)
def test_what_is_no_image_to_be_read_is_refused(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        image_key(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_images_are_read_whatever_their_name_ends_in(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png", kind)
    assert len(image_key(tmp_path / "a.png")) == 64
    with opened_image(tmp_path / "a.png") as image:
        assert image.convert("RGB").size == (8, 8)
