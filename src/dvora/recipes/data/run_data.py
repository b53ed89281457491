"""The data of a run: read, checked, without duplicates, split, and hashed for the record."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_no_device
from ..settings import Settings
from .encodings import CHUNK
from .examples import HUGE, Examples, read_examples
from .labels import are_numbers, class_name, class_names, number
from .splits import first_of_each, split_rows

Rows = list[dict[str, Any]]
SMALLEST = 2


@dataclass(frozen=True)
class Data:
    """What a run is trained and evaluated on.

    Args:
        train, validation, test: rows with `text` (and `text2`), `messages` or `image`, and `label`, a class's index or
            a number. The last two may be empty.
        labels: names of the classes; empty where there are none.
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
    read = {
        part: read_examples(paths, settings)
        for part, paths in (
            ("train", settings.data),
            ("validation", settings.validation_data),
            ("test", settings.test_data),
        )
        if paths
    }
    labels = _encode_labels(read, settings)
    notes = [note for examples in read.values() for note in examples.notes]
    distinct = {part: _without_duplicates(examples) for part, examples in read.items()}
    parts = _split(distinct, bool(labels), settings)
    clean = _without_leaks(parts)
    removed = {
        "duplicates_removed": _count(read) - _count(distinct),
        "leaks_removed": _count(parts) - _count(clean),
    }
    _check_parts(clean, settings)
    rows = {part: examples.rows for part, examples in clean.items()}
    record = {
        "files": fingerprints(settings),
        "columns": read["train"].columns,
        "rows": {part: len(found) for part, found in rows.items()},
        **removed,
    }
    notes += _notes(clean, **removed)
    keys = tuple(clean["train"].keys)
    return Data(rows["train"], rows["validation"], rows["test"], labels, record, tuple(dict.fromkeys(notes)), keys)


def _count(parts: Mapping[str, Examples]) -> int:
    return sum(len(examples.rows) for examples in parts.values())


def _encode_labels(read: Mapping[str, Examples], settings: Settings) -> tuple[str, ...]:
    """Replace raw labels by indices of classes or by numbers; the names of the classes."""
    if settings.task == "causal-lm":
        return ()
    main = read["train"]
    column = main.columns.get("label", "folder")
    raw = [row["label"] for row in main.rows]
    numbers = settings.task == "regression" or settings.label_kind == "numbers"
    if settings.task == "sentence-pairs" and settings.label_kind is None:
        numbers = are_numbers(raw)
        main.notes.append(f"label_kind: {'numbers' if numbers else 'classes'} (seen from {column!r})")
    labels = () if numbers else class_names(raw, column)
    for examples in read.values():
        encode_labels(examples, labels)
    return labels


def encode_labels(examples: Examples, labels: Sequence[str]) -> None:
    """Replace raw labels by indices of the classes, or by numbers where there are no classes.

    Raises:
        ValueError: a label is no number, or none of the classes.
    """
    indices = {name: index for index, name in enumerate(labels)}
    for row, place in zip(examples.rows, examples.places, strict=True):
        try:
            row["label"] = indices[class_name(row["label"])] if labels else number(row["label"])
        except ValueError as error:
            raise ValueError(f"{place}, column {examples.columns['label']!r}: {error}") from None
        except KeyError:
            raise ValueError(f"{place}: the class {row['label']!r} does not occur in the training data") from None


def _without_duplicates(examples: Examples) -> Examples:
    """Without the rows that repeat another one exactly; of images the content counts, not the name."""
    contents = [
        (key, row["label"]) if "image" in row else repr(row)
        for row, key in zip(examples.rows, examples.keys, strict=True)
    ]
    return examples.chosen(first_of_each(contents))


def _split(read: Mapping[str, Examples], classes: bool, settings: Settings) -> dict[str, Examples]:
    main = read["train"]
    split = split_rows(
        main.keys,
        [row["label"] for row in main.rows] if classes else [0] * len(main.rows),
        0.0 if "validation" in read else settings.validation_share,
        0.0 if "test" in read else settings.test_share,
        settings.split_seed,
    )
    drawn = {part: main.chosen(indices) for part, indices in split._asdict().items()}
    return {**drawn, **{part: examples for part, examples in read.items() if part != "train"}}


def _without_leaks(parts: Mapping[str, Examples]) -> dict[str, Examples]:
    """Training and validation rows without what is held out; only files given as parts can bring such rows."""
    clean = dict(parts)
    for part, held_out in (("train", ("validation", "test")), ("validation", ("test",))):
        known = {key for name in held_out for key in parts[name].keys}
        clean[part] = parts[part].chosen([i for i, key in enumerate(parts[part].keys) if key not in known])
    return clean


def _check_parts(parts: Mapping[str, Examples], settings: Settings) -> None:
    counts = {part: len(examples.rows) for part, examples in parts.items()}
    shares = ", ".join(f"{part} {count}" for part, count in counts.items())
    wanted = {"train": SMALLEST, "validation": int(settings.validation_share > 0), "test": int(settings.test_share > 0)}
    if short := [part for part, least in wanted.items() if counts[part] < least]:
        raise ValueError(f"too few different rows for the part {short[0]} ({shares}); add data, or change its share")


def _notes(parts: Mapping[str, Examples], duplicates_removed: int, leaks_removed: int) -> list[str]:
    notes = []
    if duplicates_removed:
        notes.append(f"{duplicates_removed:,} exact duplicates removed")
    if leaks_removed:
        notes.append(f"{leaks_removed:,} rows removed that also occur in a held-out file")
    rows = [(key, row) for part in parts.values() for key, row in zip(part.keys, part.rows, strict=True)]
    if rows and "label" in rows[0][1] and "text" in rows[0][1]:
        labels = Counter(key for key, _ in {(key, row["label"]) for key, row in rows})
        if torn := sum(count > 1 for count in labels.values()):
            notes.append(f"{torn:,} texts occur with different labels")
    huge = sum(len(row.get("text", "")) > HUGE for _, row in rows if "label" in row)
    if huge:
        notes.append(f"{huge:,} texts have more than {HUGE:,} characters; what is beyond max_length is not read")
    return notes


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
    if not path.is_dir():
        hashed = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                hashed.update(chunk)
        return hashed.hexdigest()
    lines = [f"{_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in _files_in(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
