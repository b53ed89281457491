"""Images: one, or a folder with one folder for each class.

Not by `load_dataset("imagefolder")`, which gives no labels where folders differ in depth, drops classes beside a folder
called "test", and reads any format that Pillow knows.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import check_no_device

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What a file of these names may be; others that Pillow reads, such as PostScript, start programs."""
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test"}


def labelled_images(folder: Path) -> list[tuple[Path, str]]:
    """The images in a folder, each with the class that their folder in it names.

    Raises:
        ValueError: there are none, or the folders are parts of a split, or one's name is no text.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if parts := sorted({path.name for path in classes} & PARTS):
        raise ValueError(
            f"{folder} holds {', '.join(parts)}, which are parts, not classes: give them one by one, as in data: "
            f"{folder / parts[0]}, test_data: {folder / parts[-1]}"
        )
    if broken := [path for path in classes if path.name != path.name.encode(errors="ignore").decode()]:
        raise ValueError(f"{folder}: the folder {broken[0].name!r} has a name that is no UTF-8 text; rename it")
    images = [(image, path.name) for path in classes for image in _images(path)]
    if not images:
        raise ValueError(f"{folder} holds no folders with images ({', '.join(sorted(SUFFIXES))})")
    return images


def images_in(path: Path) -> list[Path]:
    """An image, or all images in a folder and the folders in it, by name.

    Raises:
        ValueError: there are none.
    """
    images = _images(path) if path.is_dir() else [path]
    if not images:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return images


def _images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]


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
