"""The rows of a task in files: examples with labels, checked, to train and evaluate on, and inputs to predict for."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...text import listed
from ..files import check_no_device
from ..run_folder import Run
from ..settings import Settings
from .columns import KINDS, check_column, chosen_columns
from .entities import checked_entities
from .images import image_key, images_in, labelled_images
from .splits import same_text
from .tables import Note, Row, read_text, stream_table

ROLES = ("system", "user", "assistant", "tool")
STRETCHES = 100
"""Pieces of consecutive paragraphs that a single text file is held out in."""
FEW, FEW_ROWS = 20, 5
"""Different values of a column that could be the label, and rows that each has on average, at least."""
MOST_WRONG = 10
"""Rows that an error names."""
Value = TypeVar("Value")
Made = TypeVar("Made")
WHOLE_FILES = 10
"""Text files from which on whole files are held out."""


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        row: `text` (and `text2`), `passage` (a piece of a longer text), `messages` or `image` (a path), and `label`.
        key: the same for examples that a split has to keep together.
        place: where it is, for errors.
    """

    row: Row
    key: str
    place: str


def read_examples(paths: Sequence[str], settings: Settings, note: Note) -> tuple[list[Example], dict[str, str]]:
    """Read the examples of a task.

    Args:
        paths: of the files or folders.
        settings: of the run.
        note: called with what was guessed or assumed.

    Returns:
        The examples in their order, and the names of their columns by kind.

    Raises:
        ValueError: a file is not there, empty or damaged, or a row lacks what the task needs.
    """
    examples: list[Example] = []
    columns: dict[str, str] = {}
    is_whole = sum(path.lower().endswith(".txt") for path in paths) >= WHOLE_FILES
    for path in map(Path, paths):
        _check_kind(path, settings.task)
        if path.is_dir():
            for image, name in labelled_images(path):
                examples.append(Example({"image": str(image), "label": name}, image_key(image), str(image)))
        elif path.suffix.lower() == ".txt":
            text = read_text(path, settings.encoding, note)
            pieces = [text] if is_whole else _stretches(text)
            if not is_whole:
                note(f"{path.name}: held out in {len(pieces)} stretches of consecutive paragraphs")
            for number, piece in enumerate(pieces, start=1):
                examples.append(Example({"passage": piece}, same_text(piece), f"{path}, piece {number}"))
        else:
            rows = [*stream_table(path, settings.encoding, note)]
            names = {name: None for _, row in rows for name in row}
            columns.update(chosen_columns(path, names, settings, note))
            if settings.label_column is None and settings.task == "text-classification":
                values = [row for _, row in rows]
                if others := [name for name in names if name not in columns.values() and _are_labels(name, values)]:
                    note(f"label_column: it could also be {listed(others)}, with few different values")
            read = {"causal-lm": _chat_or_text, "token-classification": _with_entities}.get(settings.task, row_of)
            examples += each(rows, partial(_example, read, columns))
    return examples, columns


def _example(read: Callable[..., tuple[Row, str]], columns: Mapping[str, str], placed: tuple[str, Row]) -> Example:
    place, row = placed
    return Example(*read(row, columns, place), place)


def each(values: Iterable[Value], make: Callable[[Value], Made]) -> list[Made]:
    """What is made of each value.

    Raises:
        ValueError: of some nothing can be made; it says why of the first of them, and how many there are.
    """
    made: list[Made] = []
    wrong: list[str] = []
    for value in values:
        try:
            made.append(make(value))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        more = f"; and {len(wrong) - MOST_WRONG:,} more" if len(wrong) > MOST_WRONG else ""
        raise ValueError("; ".join(wrong[:MOST_WRONG]) + more)
    return made


def _are_labels(name: str, rows: Sequence[Row]) -> bool:
    """Whether a column's values look like labels: a few, which recur."""
    values = {str(row.get(name)).strip() for row in rows}
    return 2 <= len(values) <= min(FEW, len(rows) / FEW_ROWS)


def _check_kind(path: Path, task: str) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    check_no_device(path)
    if path.is_dir() and task != "image-classification":
        raise ValueError(f"{path} is a folder; give files (csv, tsv, jsonl, json, parquet, txt)")
    if task == "image-classification" and not path.is_dir():
        raise ValueError(f"{path} is a file; {task} reads a folder with one folder of images for each class")
    if path.suffix.lower() == ".txt" and task != "causal-lm":
        raise ValueError(f"{path} has no columns; {task} needs a text and a label in each row: csv, tsv, jsonl")


def _stretches(text: str) -> list[str]:
    """Cut a text between paragraphs, or lines if it has no paragraphs, into `STRETCHES` pieces of about one length."""
    separator = "\n\n" if text.count("\n\n") >= STRETCHES else "\n"
    pieces = [""]
    for part in text.split(separator):
        if len(pieces[-1]) >= len(text) / STRETCHES:
            pieces.append("")
        pieces[-1] += part + separator
    return [piece for piece in pieces if piece.strip()]


def row_of(values: Row, columns: Mapping[str, str], place: str) -> tuple[Row, str]:
    """What an example takes from a table's row, by the kinds of `columns`, and its key.

    Raises:
        ValueError: a text or a label is missing, or a text is none.
    """
    row, texts = Row(), list[str]()
    for kind, name in columns.items():
        value = row[kind] = values.get(name)
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{place}: column {name!r} is empty; fill it in, or remove the row")
        if kind != "label":
            if not isinstance(value, str):
                raise ValueError(f"{place}: column {name!r} holds {value!r}, which is no text")
            texts.append(same_text(value))
    # A pair in the other order gives away as much about a held-out one.
    return row, "\n".join(sorted(texts))


def _with_entities(values: Row, columns: Mapping[str, str], place: str) -> tuple[Row, str]:
    row, key = row_of(values, columns, place)
    try:
        return {**row, "label": checked_entities(row["label"], row["text"])}, key
    except ValueError as error:
        raise ValueError(f"{place}: column {columns['label']!r}: {error}") from None


def _chat_or_text(values: Row, columns: Mapping[str, str], place: str) -> tuple[Row, str]:
    messages: Any = values.get(columns["text"])
    if not isinstance(messages, list):
        return row_of(values, columns, place)
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(
                f"{place}: message {number} has to be an object with `role` and `content`, got {message!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{place}: message {number} has the role {message['role']!r}, expected {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{place}: there is no message of the assistant, so there is nothing to learn")
    texts = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": texts}, json.dumps([[m["role"], same_text(m["content"])] for m in texts])


class Input(NamedTuple):
    """A row without its label: the values that were read, by column, and `text` (and `text2`) or `image` of them."""

    values: dict[str, Any]
    row: dict[str, Any]


def reading_settings(run: Run, columns: Mapping[str, str | None]) -> Settings:
    """The settings with which a run reads other files.

    Args:
        run: finished.
        columns: names by `text_column`, `second_text_column` and `label_column`; those that are None or missing are as
            in the run's own files.
    """
    recorded: Mapping[str, str] = run.record["data"]["columns"]
    return run.settings.model_copy(update={key: columns.get(key) or recorded.get(kind) for key, kind in KINDS.items()})


def file_inputs(path: Path, settings: Settings, note: Note) -> Iterator[Input]:
    """The rows of a file: a table with at least the columns of the run's texts, or lines (.txt); images, or a folder.

    Args:
        path: of the file or folder.
        settings: see `reading_settings`.
        note: called with what was assumed.

    Raises:
        ValueError: it is not what the task needs; a mistake in a row is raised when the row is reached.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix.lower() == ".txt":
        lines = stream_table(path, settings.encoding, note)
        yield from line_inputs(((place, row["text"]) for place, row in lines), settings)
    elif settings.task == "image-classification":
        yield from (_image(str(image)) for image in images_in(path))
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; give a file (csv, tsv, jsonl, json, parquet, or txt with a text a line)")
    else:
        named = {key: name for key in ("text_column", "second_text_column") if (name := getattr(settings, key))}
        for number, (place, values) in enumerate(stream_table(path, settings.encoding, note)):
            for key, name in named.items() if not number else ():
                check_column(path, key, name, values)
            yield Input(values, row_of(values, {KINDS[key]: name for key, name in named.items()}, place)[0])


def line_inputs(lines: Iterable[tuple[str, str]], settings: Settings) -> Iterator[Input]:
    """A text, two texts with a tab between them, or the path of an image in each line; empty lines are passed over.

    Args:
        lines: each with its place.
        settings: with the names of the texts, see `reading_settings`.

    Raises:
        ValueError: a line is not what the task needs.
    """
    first, second = settings.text_column or "text", settings.second_text_column
    for place, line in lines:
        if not line.strip():
            continue
        if settings.task == "image-classification":
            yield _image(line.strip())
        elif second is None:
            yield Input({first: line}, {"text": line})
        else:
            texts = line.split("\t")
            if len(texts) != 2 or not all(text.strip() for text in texts):
                raise ValueError(f"{place}: expected two texts with a tab between them, found {len(texts)}")
            yield Input({first: texts[0], second: texts[1]}, {"text": texts[0], "text2": texts[1]})


def _image(path: str) -> Input:
    image_key(Path(path))
    return Input({"image": path}, {"image": path})
