"""Train, validation and test parts of a data set: duplicates out first, then a split by an explicit seed."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VALIDATION_SHARE = 0.1
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Texts:
    """Sentences and their targets: classes or numbers.

    Args:
        texts: N sentences.
        labels: (N,) class numbers (int64), or ratings (float32).
    """

    texts: tuple[str, ...]
    labels: npt.NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextTask:
    """A data set of sentences; `classes` names the labels 0, 1, ... and is empty where labels are ratings."""

    name: str
    classes: tuple[str, ...]
    train: Texts
    validation: Texts
    test: Texts


@dataclass(frozen=True)
class Images:
    """Grey images and their classes.

    Args:
        pixels: (N, height, width) uint8, 0 is black and 255 is white.
        labels: (N,) class numbers, int64.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class ImageTask:
    """A data set of images; `classes` names the labels 0, 1, ..."""

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images


@dataclass(frozen=True)
class Library:
    """Whole works by title, for language modelling."""

    train: dict[str, str]
    validation: dict[str, str]
    test: dict[str, str]


def first_of_each(keys: Sequence[Hashable]) -> list[int]:
    """Indices of the rows whose key did not occur before."""
    seen: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        seen.setdefault(key, index)
    return list(seen.values())


def same_text(text: str) -> str:
    """A key that is equal for texts that differ only in case or spacing (an uncased tokenizer sees no difference)."""
    return " ".join(text.split()).casefold()


def partition(count: int, seed: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Indices of the train, validation and test rows: a random 70 %, 10 % and 20 % of `count` rows.

    Raises:
        ValueError: there are too few rows for three parts.
    """
    test, validation = int(count * TEST_SHARE), int(count * VALIDATION_SHARE)
    if validation == 0:
        raise ValueError(f"count={count} rows cannot be split in train, validation and test: 10 or more are needed")
    order = np.random.default_rng(seed).permutation(count)
    return order[test + validation :], order[test : test + validation], order[:test]


def text_task(
    name: str, classes: tuple[str, ...], texts: Sequence[str], labels: Sequence[float], seed: int
) -> TextTask:
    """Drop repeated texts and split; labels become int64 where there are classes, else float32."""
    kept = first_of_each([same_text(text) for text in texts])
    numbers = np.asarray(labels, dtype=np.int64 if classes else np.float32)

    def rows(chosen: npt.NDArray[np.intp]) -> Texts:
        indices = [kept[position] for position in chosen]
        return Texts(tuple(texts[index] for index in indices), numbers[indices])

    train, validation, test = partition(len(kept), seed)
    return TextTask(name, classes, rows(train), rows(validation), rows(test))
