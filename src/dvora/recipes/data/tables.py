"""Files of rows (csv, tsv, jsonl, json, parquet) and of text, with the line that each row is in."""

import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ...tools.pages.text import did_you_mean, listed
from ..files import parsed_json
from .encodings import Note, opened_text

Placed = tuple[str, dict[str, Any]]
"""Where a row is, such as "line 7", and its values by column."""


@dataclass(frozen=True)
class Table:
    """The rows of one file.

    Args:
        path: of the file.
        columns: their names, in the file's order.
        rows: values by column.
        places: where each row is, such as "line 7".
        notes: what had to be assumed to read it.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    places: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_table(path: Path, encoding: str | None = None) -> Table:
    """Read a file in the format of its suffix.

    Args:
        path: of the file.
        encoding: None: UTF-8, or that of its byte order mark, and windows-1252 for what is not UTF-8.

    Raises:
        ValueError: the format is unknown, or the file is empty or damaged, with the place.
        OSError: it cannot be read.
    """
    notes: list[str] = []
    found = [*stream_table(path, encoding, notes.append)]
    columns = dict.fromkeys(name for _, row in found for name in row)
    return Table(path, tuple(columns), tuple(row for _, row in found), tuple(place for place, _ in found), tuple(notes))


def stream_table(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    """The rows of such a file one after another, with their places; in constant memory, unless it is a .json.

    Raises:
        ValueError, OSError: as `read_table`, when the place is reached.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        near = did_you_mean(suffix, [*_READERS, ".txt"])
        raise ValueError(f"{path}: the suffix {suffix!r} names no format that is read here; {near}")
    empty = True
    for placed in _READERS[suffix](path, encoding, note):
        empty = False
        yield placed
    if empty:
        raise ValueError(f"{path} has no rows")


def read_text(path: Path, encoding: str | None = None) -> tuple[str, tuple[str, ...]]:
    r"""A text file, its line ends as "\n", and notes on what had to be assumed.

    Raises:
        ValueError: it is empty, no text, or not in the encoding.
        OSError: it cannot be read.
    """
    notes: list[str] = []
    with opened_text(path, encoding, notes.append) as file:
        return file.read(), tuple(notes)


def _read_csv(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    with opened_text(path, encoding, note) as file:
        first = file.readline()
        delimiter = ","
        if delimiter not in first and (others := [other for other in ";\t|" if other in first]):
            delimiter = max(others, key=first.count)
            note(f"{path.name} has no commas in its first line: read as separated by {delimiter!r}")
        yield from _separated(path, chain([first], file), delimiter)


def _read_tsv(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    with opened_text(path, encoding, note) as file:
        yield from _separated(path, file, "\t")


def _separated(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[Placed]:
    records = _records(path, lines, delimiter)
    _, header = next(records)
    columns = tuple(name.strip() for name in header)
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise ValueError(
            f"{path}: the column {twice[0]!r} occurs twice in the first line, which has to name the columns"
        )
    for line, fields in records:
        if len(fields) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} fields where the first line names {len(columns)} columns "
                f"({listed(columns)}); a field with {delimiter!r} in it has to be in double quotes"
            )
        yield f"line {line}", dict(zip(columns, fields, strict=True))


def _records(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, with the line that each starts in."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 1
    try:
        for fields in reader:
            if fields:
                yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: {error}; is a double quote left open or not doubled there?") from None
    finally:
        csv.field_size_limit(limit)


def _read_json_lines(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    with opened_text(path, encoding, note) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked(path, f"line {number}", _parsed(path, f", line {number}", line))


def _read_json(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    with opened_text(path, encoding, note) as file:
        rows = _parsed(path, "", file.read())
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, each an object; for one object a line name the file .jsonl")
    for number, row in enumerate(rows, start=1):
        yield _checked(path, f"row {number}", row)


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return parsed_json(text)
    except ValueError as error:
        raise ValueError(f"{path}{place}: not JSON: {error}") from None


def _checked(path: Path, place: str, row: Any) -> Placed:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, {place}: expected an object with a value for each column, got {type(row).__name__}")
    return place, row


def _read_parquet(path: Path, encoding: str | None, note: Note) -> Iterator[Placed]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        # Not `read_table`, which takes the names of folders ("label=1") for columns.
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None


_READERS: dict[str, Callable[[Path, str | None, Note], Iterator[Placed]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
