"""The data of a run: read, checked, without duplicates, split, and hashed for the record."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_no_device
from ..run_folder import Run
from ..settings import Settings
from .examples import Example, read_examples, reading_settings
from .labels import classes_of, encode_labels, torn_texts
from .splits import split_rows
from .tables import CHUNK, Note

Rows = list[dict[str, Any]]
Parts = dict[str, list[Example]]
SMALLEST = 2
SHOWN = 3
"""Texts that a note names."""


@dataclass(frozen=True)
class Data:
    """What a run is trained and evaluated on.

    Args:
        train, validation, test: rows with `text` (and `text2`), `messages` or `image`, and `label`, a class's index, a
            number or a tuple of entities. The last two may be empty.
        labels: names of the classes, of tokens their tags; empty where there are none.
        record: for run.json: sha256 and size of each file, columns, counts.
        notes: what was guessed, assumed or removed.
        train_keys: of the training rows: what the same example has in any file.
    """

    train: Rows
    validation: Rows
    test: Rows
    labels: tuple[str, ...]
    record: dict[str, Any]
    notes: tuple[str, ...]
    train_keys: tuple[str, ...] = ()


def load_data(settings: Settings) -> Data:
    """Read and split the data of a run; the same files and seed give the same parts everywhere.

    Raises:
        ValueError: a file or a row is not what the task needs, or there are too few rows.
    """
    notes: list[str] = []
    train, columns = read_examples(settings.data, settings, notes.append)
    read: Parts = {"train": train}
    for part, paths in (("validation", settings.validation_data), ("test", settings.test_data)):
        if paths:
            read[part], _ = read_examples(paths, settings, notes.append)
    labels: tuple[str, ...] = ()
    if settings.task != "causal-lm":
        labels = classes_of(train, columns.get("label", "folder"), settings, notes.append)
        for examples in read.values():
            encode_labels(examples, labels)
    distinct = {part: _without_duplicates(examples) for part, examples in read.items()}
    drawn = _split(distinct, bool(labels) and settings.task != "token-classification", settings)
    parts = _without_leaks(drawn)
    rows = {part: len(examples) for part, examples in parts.items()}
    _check_sizes(rows, settings)
    counts = [sum(map(len, examples.values())) for examples in (read, distinct, drawn, parts)]
    duplicates, leaks = counts[0] - counts[1], counts[2] - counts[3]
    if duplicates:
        notes.append(f"{duplicates:,} exact duplicates removed")
    if leaks:
        notes.append(f"{leaks:,} rows removed that also occur in a held-out file")
    if torn := torn_texts(parts.values(), labels):
        more = f"; and {len(torn) - SHOWN:,} more" if len(torn) > SHOWN else ""
        notes.append(f"texts with different labels, {len(torn):,}: {'; '.join(torn[:SHOWN])}{more}")
    record = {
        "files": fingerprints(settings),
        "columns": columns,
        "rows": rows,
        "duplicates_removed": duplicates,
        "leaks_removed": leaks,
    }
    return Data(
        **{part: [example.row for example in examples] for part, examples in parts.items()},
        labels=labels,
        record=record,
        notes=tuple(dict.fromkeys(notes)),
        train_keys=tuple(example.key for example in parts["train"]),
    )


def labelled_examples(
    paths: Sequence[str], run: Run, columns: Mapping[str, str | None], note: Note = lambda _: None
) -> list[Example]:
    """The examples in some files, their labels as the run's model predicts them; `note` is called with assumptions.

    Raises:
        ValueError: a file or a row is not what the task needs, or a label is none of the run's.
    """
    examples, _ = read_examples(paths, reading_settings(run, columns), note)
    if run.settings.task != "causal-lm":
        encode_labels(examples, run.labels)
    return examples


def _without_duplicates(examples: Sequence[Example]) -> list[Example]:
    """Without the rows that repeat another one exactly; of images the content counts, not the name."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(repr((example.key, {**example.row, "image": None})), example)
    return [*first.values()]


def _split(read: Parts, classes: bool, settings: Settings) -> Parts:
    train = read["train"]
    split = split_rows(
        [example.key for example in train],
        [example.row["label"] if classes else 0 for example in train],
        0.0 if "validation" in read else settings.validation_share,
        0.0 if "test" in read else settings.test_share,
        settings.split_seed,
    )
    drawn = {part: [train[row] for row in rows] for part, rows in split._asdict().items()}
    return {**drawn, **{part: examples for part, examples in read.items() if part != "train"}}


def _without_leaks(parts: Parts) -> Parts:
    """Training and validation rows without what is held out; only files given as parts can bring such rows."""
    test = {example.key for example in parts["test"]}
    held_out = test | {example.key for example in parts["validation"]}
    return {
        "train": [example for example in parts["train"] if example.key not in held_out],
        "validation": [example for example in parts["validation"] if example.key not in test],
        "test": parts["test"],
    }


def _check_sizes(rows: Mapping[str, int], settings: Settings) -> None:
    least = {"train": SMALLEST, "validation": int(settings.validation_share > 0), "test": int(settings.test_share > 0)}
    if short := [part for part in least if rows[part] < least[part]]:
        sizes = ", ".join(f"{part} {count}" for part, count in rows.items())
        raise ValueError(f"too few different rows for the part {short[0]} ({sizes}); add data, or change its share")


def fingerprints(settings: Settings) -> dict[str, dict[str, Any]]:
    """sha256 and size of each of a run's files and folders.

    Raises:
        OSError: one cannot be read, or is not there.
    """
    return {path: {"sha256": _sha256(Path(path)), "bytes": size_of(Path(path))} for path in settings.all_data}


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder's files.

    Raises:
        OSError: it is not there.
        ValueError: it is a pipe or a device.
    """
    check_no_device(path)
    return sum(file.stat().st_size for file in _files_in(path)) if path.is_dir() else path.stat().st_size


def _sha256(path: Path) -> str:
    """Of a file, or of the names and contents of a folder's files."""
    hashed = hashlib.sha256()
    if path.is_dir():
        for file in _files_in(path):
            hashed.update(f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return hashed.hexdigest()
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            hashed.update(chunk)
    return hashed.hexdigest()


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
