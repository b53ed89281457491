"""The examples of a task in its files: checked, each with its place for errors and a key for what is the same."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..files import check_no_device
from ..settings import Settings
from .columns import Columns, chosen_columns
from .images import image_examples
from .splits import same_text
from .tables import Table, read_table, read_text

ROLES = ("system", "user", "assistant", "tool")
STRETCHES = 100
"""Pieces of consecutive paragraphs that a single text file is held out in."""
WHOLE_FILES = 10
"""Text files from which on whole files are held out."""
HUGE = 1_000_000
"""Characters of a text of which its reader should know."""


@dataclass(frozen=True)
class Examples:
    """The examples of some files, in their order.

    Args:
        rows: `text` (and `text2`), `passage` (a piece of a longer text), `messages` or `image` (a path), and `label`.
        keys: the same for examples that a split has to keep together.
        places: file and line of each.
        columns: names by kind, for the record.
        notes: what was guessed or assumed.
    """

    rows: list[dict[str, Any]]
    keys: list[str]
    places: list[str]
    columns: dict[str, str]
    notes: list[str]

    def chosen(self, indices: Sequence[int]) -> "Examples":
        """Some of them."""
        return replace(
            self,
            rows=[self.rows[index] for index in indices],
            keys=[self.keys[index] for index in indices],
            places=[self.places[index] for index in indices],
        )


def read_examples(paths: Sequence[str], settings: Settings) -> Examples:
    """Read the examples of a task.

    Raises:
        ValueError: a file is not there, empty or damaged, or a row lacks what the task needs.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        check_no_device(path)
        if path.is_dir() != (settings.task == "image-classification"):
            raise ValueError(
                f"{path} is a folder; give files (csv, tsv, jsonl, json, parquet, txt)"
                if path.is_dir()
                else f"{path} is a file; image-classification reads a folder with one folder of images for each class"
            )
    if settings.task == "image-classification":
        found, keys = image_examples([Path(path) for path in paths])
        return Examples(found, keys, [row["image"] for row in found], {}, [])
    texts = [Path(path) for path in paths if path.lower().endswith(".txt")]
    if texts and settings.task != "causal-lm":
        raise ValueError(
            f"{texts[0]} has no columns; {settings.task} needs a text and a label in each row: csv, tsv, jsonl"
        )
    examples = Examples([], [], [], {}, [])
    for path in map(Path, paths):
        if path in texts:
            _add_text(examples, path, settings.encoding, whole=len(texts) >= WHOLE_FILES)
        else:
            _add_table(examples, read_table(path, settings.encoding), settings)
    examples.notes[:] = dict.fromkeys(examples.notes)
    return examples


def _add_text(examples: Examples, path: Path, encoding: str | None, whole: bool) -> None:
    text, notes = read_text(path, encoding)
    pieces = [text] if whole else stretches(text, STRETCHES)
    if not whole:
        examples.notes.append(f"{path.name}: held out in {len(pieces)} stretches of consecutive paragraphs")
    examples.notes.extend(notes)
    examples.rows.extend({"passage": piece} for piece in pieces)
    examples.keys.extend(map(same_text, pieces))
    examples.places.extend(f"{path}, piece {number}" for number in range(1, len(pieces) + 1))


def stretches(text: str, count: int) -> list[str]:
    """Cut a text between paragraphs, or lines if it has no paragraphs, into about `count` pieces of one length."""
    separator = "\n\n" if text.count("\n\n") >= count else "\n"
    length, pieces, piece = len(text) / count, [], ""
    for part in text.split(separator):
        piece += part + separator
        if len(piece) >= length:
            pieces.append(piece)
            piece = ""
    return [piece for piece in (*pieces, piece) if piece.strip()]


def _add_table(examples: Examples, table: Table, settings: Settings) -> None:
    columns = chosen_columns(table, settings)
    examples.notes.extend((*table.notes, *columns.notes))
    named = {"text": columns.text, "text2": columns.second, "label": columns.label}
    examples.columns.update({kind: name for kind, name in named.items() if name is not None})
    _check_labels(table, columns)
    read = _chat if settings.task == "causal-lm" and _holds_chats(table, columns.text) else row_of
    for values, place in zip(table.rows, table.places, strict=True):
        where = f"{table.path}, {place}"
        row, key = read(values, columns, where)
        examples.rows.append(row)
        examples.keys.append(key)
        examples.places.append(where)


def _check_labels(table: Table, columns: Columns) -> None:
    if columns.label is None:
        return
    lacking = [
        place for row, place in zip(table.rows, table.places, strict=True) if _is_missing(row.get(columns.label))
    ]
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        raise ValueError(
            f"{table.path}: column {columns.label!r} has no label in {', '.join(lacking[:5])}{more}; fill in or remove "
            "these rows"
        )


def _is_missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def row_of(values: dict[str, Any], columns: Columns, where: str) -> tuple[dict[str, Any], str]:
    """The texts and the label in a table's row, and the key of the example.

    Raises:
        ValueError: a text is missing or none.
    """
    row = {"text": _text(values, columns.text, where)}
    key = same_text(row["text"])
    if columns.second is not None:
        row["text2"] = _text(values, columns.second, where)
        # A pair in the other order gives away as much about a held-out one.
        key = "\n".join(sorted((key, same_text(row["text2"]))))
    if columns.label is not None:
        row["label"] = values[columns.label]
    return row, key


def _text(values: dict[str, Any], column: str, where: str) -> str:
    text = values.get(column)
    if _is_missing(text):
        raise ValueError(f"{where}: column {column!r} has no text")
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {text!r}, which is no text")
    return text


def _holds_chats(table: Table, column: str) -> bool:
    return any(isinstance(row.get(column), list) for row in table.rows)


def _chat(values: dict[str, Any], columns: Columns, where: str) -> tuple[dict[str, Any], str]:
    messages = values.get(columns.text)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: column {columns.text!r} holds no messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(
                f"{where}: message {number} has to be an object with `role` and `content`, got {message!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: message {number} has the role {message['role']!r}, expected {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where}: there is no message of the assistant, so there is nothing to learn")
    found = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"messages": found}, json.dumps([[m["role"], same_text(m["content"])] for m in found])
