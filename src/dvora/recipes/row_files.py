"""Rows as text, one after another: CSV, TSV, JSON lines, or one JSON object around them all."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .nearest import did_you_mean

Row = Mapping[str, Any]


def writer_for(suffix: str) -> Callable[[Iterable[Row]], Iterator[str]]:
    """What makes text of rows, row by row, for a file of that suffix.

    A table has the columns of its first row; a later row that has others raises a ValueError when it is reached.

    Raises:
        ValueError: the suffix names no format that is written here.
    """
    if suffix.lower() not in _WRITERS:
        raise ValueError(
            f"the suffix {suffix!r} names no format that is written here, {did_you_mean(suffix, _WRITERS)}"
        )
    return _WRITERS[suffix.lower()]


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """An object a line."""
    for row in rows:
        yield _json(row) + "\n"


def json_object(rows: Iterable[Row], name: str) -> Iterator[str]:
    """One object, with all rows in a list of that name."""
    separator = f'{{"{name}": ['
    for row in rows:
        yield separator + _json(row)
        separator = ",\n"
    yield "]}\n" if separator == ",\n" else f"{separator}]}}\n"


def _csv(rows: Iterable[Row]) -> Iterator[str]:
    return _separated(rows, ",")


def _tsv(rows: Iterable[Row]) -> Iterator[str]:
    return _separated(rows, "\t")


def _separated(rows: Iterable[Row], delimiter: str) -> Iterator[str]:
    header: tuple[str, ...] | None = None
    for number, row in enumerate(rows, start=1):
        if header is None:
            header = tuple(row)
            yield _line(header, delimiter)
        if unknown := row.keys() - {*header}:
            raise ValueError(
                f"row {number} has {min(unknown)!r}, which the first row lacks, so a table cannot hold it; write .jsonl"
            )
        yield _line([_cell(row.get(name)) for name in header], delimiter)


def _line(cells: Iterable[str], delimiter: str) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _json(value) if isinstance(value, dict | list | bool) else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


_WRITERS: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
}
