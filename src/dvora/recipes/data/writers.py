"""Rows as text, one after another: CSV, TSV, JSON lines, or one JSON object around them all."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ...text import did_you_mean

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What spreadsheets take for the beginning of a formula, or pass over before one."""
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
Row = Mapping[str, Any]


def writer_for(suffix: str, safe: bool = False) -> Callable[[Iterable[Row]], Iterator[str]]:
    """What makes text of rows, row by row, for a file of that suffix.

    A table has the columns of its first row; a later row that has others raises a ValueError when it is reached.

    Args:
        suffix: such as ".csv".
        safe: put an apostrophe before text in a table that a spreadsheet would take for a formula.

    Raises:
        ValueError: the suffix names no format that is written here, or one that no spreadsheet opens as a table.
    """
    if delimiter := {".csv": ",", ".tsv": "\t"}.get(suffix.lower()):
        return partial(_separated, delimiter=delimiter, safe=safe)
    if suffix.lower() not in (".jsonl", ".ndjson"):
        near = did_you_mean(suffix, (".csv", ".tsv", ".jsonl", ".ndjson"))
        raise ValueError(f"the suffix {suffix!r} names no format that is written here, {near}")
    if safe:
        raise ValueError(f"only tables are opened by spreadsheets; {suffix} is none, write .csv or .tsv to be safe")
    return json_lines


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """An object a line."""
    return (_json(row) + "\n" for row in rows)


def json_object(rows: Iterable[Row], name: str) -> Iterator[str]:
    """One object, with all rows in a list of that name."""
    yield f'{{"{name}": ['
    for number, row in enumerate(rows):
        yield (",\n" if number else "") + _json(row)
    yield "]}\n"


class _Lines:
    """A file for `csv` whose writer returns what it writes."""

    @staticmethod
    def write(text: str) -> str:
        return text


def _separated(rows: Iterable[Row], delimiter: str, safe: bool) -> Iterator[str]:
    writer: Any = csv.writer(_Lines, delimiter=delimiter, lineterminator="\n")
    columns: list[str] = []
    for number, row in enumerate(rows, start=1):
        if number == 1:
            columns = [*row]
            yield writer.writerow([_cell(name, safe) for name in columns])
        if unknown := row.keys() - {*columns}:
            lacks = f"row {number} has {min(unknown)!r}, which the first row lacks, so a table cannot hold it"
            raise ValueError(f"{lacks}; write .jsonl")
        yield writer.writerow([_cell(row.get(name), safe) for name in columns])


def _cell(value: Any, safe: bool) -> str:
    if value is None:
        return ""
    cell = _json(value) if isinstance(value, dict | list | bool) else str(value)
    return f"'{cell}" if safe and cell.startswith(FORMULA) and not NUMBER.fullmatch(cell) else cell


def _json(value: Any) -> str:
    """With letters as they are, unless some do something to a terminal: JSON can spell them."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else json.dumps(value, default=str).replace("\x7f", "\\u007f")
