"""Files of rows (csv, tsv, jsonl, json, parquet) and of text, read whole, with the line that each row is in."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .nearest import did_you_mean


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
    """Read a file in the format that its suffix says.

    Args:
        path: of the file.
        encoding: None: UTF-8, or what its mark says, and windows-1252 for what is not UTF-8.

    Raises:
        ValueError: the format is unknown, or the file is empty or damaged; says where.
        OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        near = did_you_mean(suffix, [*_READERS, ".txt"])
        raise ValueError(f"{path}: the suffix {suffix!r} names no format that is read here; {near}")
    table = _READERS[suffix](path, encoding)
    if not table.rows:
        raise ValueError(f"{path} has no rows")
    return table


def read_text(path: Path, encoding: str | None = None) -> tuple[str, tuple[str, ...]]:
    r"""A text file, its line ends as "\n", and notes on what had to be assumed.

    Raises:
        ValueError: it is empty, no text, or not in the encoding.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        text, notes = _decoded(content, path, encoding)
    except LookupError:
        raise ValueError(f"encoding {encoding!r} is unknown; `utf-8`, `latin-1` and `cp1252` are common ones") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if "\0" in text:
        raise ValueError(
            f"{path} is no text: it has a zero byte in line {text[: text.index(chr(0))].count(chr(10)) + 1}"
        )
    return text, notes


def _decoded(content: bytes, path: Path, encoding: str | None) -> tuple[str, tuple[str, ...]]:
    if encoding is None and content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    try:
        return content.decode(encoding or "utf-8-sig").removeprefix("\ufeff"), ()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        if encoding:
            raise ValueError(f"{path}, line {line}: not {encoding} ({error.reason})") from None
    try:
        text, name = content.decode("cp1252"), "windows-1252"
    except UnicodeDecodeError:
        text, name = content.decode("latin-1"), "latin-1"
    return text, (f"{path.name} is not UTF-8 (line {line}): read as {name}; set `encoding` if it is another",)


def _read_csv(path: Path, encoding: str | None) -> Table:
    text, notes = read_text(path, encoding)
    first = text.partition("\n")[0]
    delimiter = ","
    if delimiter not in first and (others := [other for other in ";\t|" if other in first]):
        delimiter = max(others, key=first.count)
        notes = (*notes, f"{path.name} has no commas in its first line: read as separated by {delimiter!r}")
    return _separated(path, text, delimiter, notes)


def _read_tsv(path: Path, encoding: str | None) -> Table:
    text, notes = read_text(path, encoding)
    return _separated(path, text, "\t", notes)


def _separated(path: Path, text: str, delimiter: str, notes: tuple[str, ...]) -> Table:
    rows, places = [], []
    records = _records(path, text, delimiter)
    _, header = next(records)
    columns = tuple(name.strip() for name in header)
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(
            f"{path}: the column {twice[0]!r} occurs twice in the first line, which has to name the columns"
        )
    for line, fields in records:
        if len(fields) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(fields)} fields where the first line names {len(columns)} columns "
                f"({', '.join(columns)}); a field with {delimiter!r} in it has to be in double quotes"
            )
        rows.append(dict(zip(columns, fields, strict=True)))
        places.append(f"line {line}")
    return Table(path, columns, tuple(rows), tuple(places), notes)


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records that are not empty, with the line that each starts in."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def _read_json_lines(path: Path, encoding: str | None) -> Table:
    text, notes = read_text(path, encoding)
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parsed(path, f", line {number}", line))
            places.append(f"line {number}")
    return _of_objects(path, rows, places, notes)


def _read_json(path: Path, encoding: str | None) -> Table:
    text, notes = read_text(path, encoding)
    rows = _parsed(path, "", text)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, each an object; for one object a line name the file .jsonl")
    return _of_objects(path, rows, [f"row {number}" for number in range(1, len(rows) + 1)], notes)


def _parsed(path: Path, place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}{place}: not JSON: {error}") from None


def _of_objects(path: Path, rows: list[Any], places: list[str], notes: tuple[str, ...]) -> Table:
    columns: dict[str, None] = {}
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {place}: expected an object with a value for each column, got {type(row).__name__}"
            )
        columns |= dict.fromkeys(row)
    return Table(path, tuple(columns), tuple(rows), tuple(places), notes)


def _read_parquet(path: Path, encoding: str | None) -> Table:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        # Not `read_table`, which takes the names of folders ("label=1") for columns.
        read = parquet.ParquetFile(path).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from None
    rows = read.to_pylist()
    return Table(path, tuple(read.column_names), tuple(rows), tuple(f"row {n}" for n in range(1, len(rows) + 1)))


_READERS: dict[str, Callable[[Path, str | None], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
