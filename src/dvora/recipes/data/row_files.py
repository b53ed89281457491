"""Rows as text, one after another: CSV, TSV, JSON lines, or one JSON object around them all."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ...tools.pages.text import did_you_mean, visible

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
    if suffix.lower() not in _WRITERS:
        raise ValueError(
            f"the suffix {suffix!r} names no format that is written here, {did_you_mean(suffix, _WRITERS)}"
        )
    if not safe:
        return _WRITERS[suffix.lower()]
    if suffix.lower() not in _SAFE_WRITERS:
        raise ValueError(
            f"only tables are opened by spreadsheets; {suffix} is none, write .csv or .tsv to be safe there"
        )
    return _SAFE_WRITERS[suffix.lower()]


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


def _separated(rows: Iterable[Row], delimiter: str, shown: Callable[[str], str] = str) -> Iterator[str]:
    header: tuple[str, ...] | None = None
    for number, row in enumerate(rows, start=1):
        if header is None:
            header = tuple(row)
            yield _line(map(shown, header), delimiter)
        if unknown := row.keys() - {*header}:
            raise ValueError(
                f"row {number} has {min(unknown)!r}, which the first row lacks, so a table cannot hold it; write .jsonl"
            )
        yield _line([shown(_cell(row.get(name))) for name in header], delimiter)


def _line(cells: Iterable[str], delimiter: str) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _json(value) if isinstance(value, dict | list | bool) else str(value)


def _without_formula(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA) and not NUMBER.fullmatch(cell) else cell


def _json(value: Any) -> str:
    """With letters as they are, but for those that do something to a terminal, which JSON can spell."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isprintable() else "".join(map(_spelled, text))


def _spelled(letter: str) -> str:
    return letter if visible(letter) == letter else json.dumps(letter)[1:-1].replace("\x7f", "\\u007f")


_WRITERS: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".jsonl": json_lines,
    ".ndjson": json_lines,
}
_SAFE_WRITERS: dict[str, Callable[[Iterable[Row]], Iterator[str]]] = {
    ".csv": partial(_separated, delimiter=",", shown=_without_formula),
    ".tsv": partial(_separated, delimiter="\t", shown=_without_formula),
}
