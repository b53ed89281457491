"""The data of a run: read, checked, without duplicates, split, and hashed for the record."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from ..files import check_no_device
from ..run_folder import Run
from ..settings import Settings
from .entities import tags_of
from .examples import Example, read_examples, reading_settings
from .splits import split_rows
from .tables import CHUNK, Note

Rows = list[dict[str, Any]]
Parts = dict[str, list[Example]]
SMALLEST = 2
MANY = 20
"""Classes, or different numbers, from which on a column looks like another kind of column."""
LARGEST = 1e9
"""Of a label that is a number: gradients grow with its square, and what clips them squares them, up to 3e38."""


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
        labels = _classes(train, columns.get("label", "folder"), settings, notes.append)
        for examples in read.values():
            _encode_labels(examples, labels)
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
    if torn := _torn(parts):
        notes.append(f"{torn:,} texts occur with different labels")
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
        _encode_labels(examples, run.labels)
    return examples


def _encode_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Replace raw labels by indices of the classes, or by numbers where there are no classes."""
    indices = {name: index for index, name in enumerate(labels)}
    for example in examples:
        label = example.row["label"]
        try:
            if isinstance(label, tuple):
                example.row["label"] = tuple(one._replace(label=indices[f"B-{one.label}"]) for one in label)
                continue
            example.row["label"] = indices[_class_name(label)] if labels else _number(label)
            if not labels and abs(example.row["label"]) > LARGEST:
                raise ValueError(f"{label!r} is beyond {LARGEST:,.0f}, too large to train with; divide the column")
        except KeyError as error:
            name = str(error.args[0]).removeprefix("B-") if isinstance(label, tuple) else label
            raise ValueError(f"{example.place}: the class {name!r} does not occur in the training data") from None
        except ValueError as error:
            raise ValueError(f"{example.place}: the label {error}") from None


def _classes(train: Sequence[Example], column: str, settings: Settings, note: Note) -> tuple[str, ...]:
    """The names of the classes; none where the labels are numbers."""
    labels = [example.row["label"] for example in train]
    if settings.task == "token-classification":
        if not (names := {one.label for entities in labels for one in entities}):
            raise ValueError(f"column {column!r} has no entity in any row; there is nothing to predict")
        return tags_of([*names])
    numbers = settings.task == "regression" or settings.label_kind == "numbers"
    if settings.task == "sentence-pairs" and settings.label_kind is None:
        numbers = _are_numbers(labels)
        note(f"label_kind: {'numbers' if numbers else 'classes'} (seen from {column!r})")
    return () if numbers else _class_names(labels, column)


def _class_name(value: object) -> str:
    """A label as a class; 1 and 1.0 are the same one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _class_names(values: Sequence[object], column: str) -> tuple[str, ...]:
    """The classes in their order: by number if they all are whole numbers, else by name."""
    names = sorted({*map(_class_name, values)})
    if len(names) == 1:
        raise ValueError(f"column {column!r} has the single class {names[0]!r}; there is nothing to predict")
    if len(names) > max(MANY, len(values) / 2):
        raise ValueError(
            f"column {column!r} has {len(names)} different labels in {len(values)} rows; is it the right label_column? "
            "For numbers take the task regression, or label_kind: numbers"
        )
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def _number(value: Any) -> float:
    """A label as a finite number."""
    try:
        label = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    except OverflowError:
        label = inf
    if not isfinite(label):
        raise ValueError(f"{value!r} is not finite")
    return label


def _are_numbers(values: Sequence[object]) -> bool:
    """Whether labels look like numbers: all are, and some have a fraction or there are many different ones."""
    try:
        numbers = {_number(value) for value in values}
    except ValueError:
        return False
    return len(numbers) > MANY or any(not value.is_integer() for value in numbers)


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


def _torn(parts: Parts) -> int:
    """How many texts have several labels."""
    labelled = [example for part in parts.values() for example in part if {"text", "label"} <= example.row.keys()]
    labels = Counter(key for key, _ in {(example.key, example.row["label"]) for example in labelled})
    return sum(count > 1 for count in labels.values())


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
