"""The examples of a task in its files: checked, each with its place for errors and a key for what is the same."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_no_device
from ..settings import Settings
from .columns import chosen_columns
from .images import image_key, labelled_images
from .splits import same_text
from .tables import Note, Row, opened_text, stream_table

ROLES = ("system", "user", "assistant", "tool")
STRETCHES = 100
"""Pieces of consecutive paragraphs that a single text file is held out in."""
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
    many = sum(path.lower().endswith(".txt") for path in paths) >= WHOLE_FILES
    for path in map(Path, paths):
        _check_kind(path, settings.task)
        if path.is_dir():
            for image, name in labelled_images(path):
                examples.append(Example({"image": str(image), "label": name}, image_key(image), str(image)))
        elif path.suffix.lower() == ".txt":
            examples += _pieces(path, settings.encoding, note, many)
        else:
            rows = [*stream_table(path, settings.encoding, note)]
            names = dict.fromkeys(name for _, row in rows for name in row)
            columns.update(chosen_columns(path, names, settings, note))
            read = _chat_or_text if settings.task == "causal-lm" else row_of
            examples += [Example(*read(row, columns, place), place) for place, row in rows]
    return examples, columns


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


def _pieces(path: Path, encoding: str | None, note: Note, in_one: bool) -> Iterator[Example]:
    try:
        with opened_text(path, encoding, note) as file:
            text = file.read()
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path}: {error}") from None
    pieces = [text] if in_one else _stretches(text)
    if not in_one:
        note(f"{path.name}: held out in {len(pieces)} stretches of consecutive paragraphs")
    for number, piece in enumerate(pieces, start=1):
        yield Example({"passage": piece}, same_text(piece), f"{path}, piece {number}")


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
    row = {kind: values.get(name) for kind, name in columns.items()}
    for kind, value in row.items():
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            raise ValueError(f"{place}: column {columns[kind]!r} is empty; fill it in, or remove the row")
        if kind != "label" and not isinstance(value, str):
            raise ValueError(f"{place}: column {columns[kind]!r} holds {value!r}, which is no text")
    # A pair in the other order gives away as much about a held-out one.
    return row, "\n".join(sorted(same_text(str(row[kind])) for kind in ("text", "text2") if kind in row))


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
