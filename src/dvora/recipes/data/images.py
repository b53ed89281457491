"""A folder of images: one folder for each class."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import check_no_device

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What a file of these names may be; others that Pillow reads, such as PostScript, start programs."""
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test"}


def image_examples(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The images with the class that their folder names, and the sha256 of each file.

    Raises:
        ValueError: there are no images, one cannot be read, or the folders are parts of a split.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if parts := sorted({path.name for path in classes} & PARTS):
            raise ValueError(
                f"{folder} holds {', '.join(parts)}, which are parts, not classes: give them one by one, as in data: "
                f"{folder / parts[0]}, test_data: {folder / parts[-1]}"
            )
        found = [
            {"image": str(path), "label": name.name}
            for name in classes
            for path in sorted(name.rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise ValueError(f"{folder} holds no folders with images ({', '.join(sorted(SUFFIXES))})")
        rows += found
    return rows, [image_key(Path(row["image"])) for row in rows]


def images_in(path: Path) -> list[Path]:
    """An image, or all images in a folder and the folders in it, by name.

    Raises:
        ValueError: there are none.
    """
    if not path.is_dir():
        return [path]
    found = [image for image in sorted(path.rglob("*")) if image.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


@contextmanager
def opened_image(path: Path) -> Iterator[Any]:
    """An image, as Pillow reads it.

    Raises:
        ValueError: it is no regular file, no image that can be read, or one of so many points that it is an attack.
    """
    from PIL import Image, UnidentifiedImageError

    check_no_device(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} has too many points to be read: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None


def image_key(path: Path) -> str:
    """The sha256 of an image's file.

    Raises:
        ValueError: it is no image that can be read.
    """
    with opened_image(path) as image:
        image.verify()
    return hashlib.sha256(path.read_bytes()).hexdigest()
