"""Files of rows (csv, tsv, jsonl, json, parquet) and of text, every cell and line as it is written.

By Python's `csv` and `json` and by pyarrow. `datasets.load_dataset` would be shorter, but it takes texts for dates and
numbers, moves the cells of rows that are too long into other columns, and keeps copies that can be out of date.
"""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ...text import did_you_mean, listed
from ..files import check_no_device

Note = Callable[[str], None]
Row = dict[str, Any]
CHUNK = 2**20
MARK = "\ufeff"


def stream_table(path: Path, encoding: str | None, note: Note, suffix: str | None = None) -> Iterator[tuple[str, Row]]:
    """The rows of a file in the format of its suffix, one after another; in constant memory, unless it is a .json.

    Args:
        path: of the file.
        encoding: see `opened_text`.
        note: called with what had to be assumed.
        suffix: None: that of the path. Of a .txt each line is a row with a `text`.

    Returns:
        Where each row is, such as "a.csv, row 7", and its values by column.

    Raises:
        ValueError: the format is unknown, or the file is empty or damaged, when the place is reached.
        OSError: it cannot be read.
    """
    suffix = (suffix or path.suffix).lower()
    if suffix not in _READERS:
        raise ValueError(
            f"{path}: the suffix {suffix!r} names no format that is read here, {did_you_mean(suffix, _READERS)}"
        )
    check_no_device(path)
    number = 0
    try:
        for number, row in enumerate(map(_whole_characters, _READERS[suffix](path, encoding, note)), start=1):
            yield f"{path}, row {number}", row
    except (ValueError, LookupError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}, row {number + 1}: {error}") from None
    if not number:
        raise ValueError(f"{path} has no rows")


@contextmanager
def opened_text(path: Path, encoding: str | None, note: Note) -> Iterator[TextIO]:
    r"""A text file to read, its line ends as "\n" and without a byte order mark.

    Args:
        path: of the file.
        encoding: None: UTF-8, or that of its byte order mark, and windows-1252 for what is not UTF-8. The file is then
            read once before it is opened.
        note: called with what had to be assumed.

    Raises:
        ValueError, LookupError: it is no text, or not in the encoding, or there is no such encoding.
        OSError: it cannot be read.
    """
    with path.open(encoding=encoding or _guessed_encoding(path, note)) as file:
        if file.read(1) != MARK:
            file.seek(0)
        yield file


def read_text(path: Path, encoding: str | None, note: Note) -> str:
    """All of a text file, see `opened_text`.

    Raises:
        ValueError: it is no text, or not in the encoding.
        OSError: it cannot be read.
    """
    try:
        with opened_text(path, encoding, note) as file:
            return str(_whole_characters({"text": file.read()})["text"])
    except (ValueError, LookupError) as error:
        raise ValueError(f"{path}: {error}") from None


def _whole_characters(row: Row) -> Row:
    r"""A row that can be written as UTF-8, as tokenizers and files need it: JSON may have half of a "\ud83d\ude00"."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"column {name!r} holds {error.object[error.start]!r}, half of a character (a surrogate alone), which "
                "cannot be read as text; put in the whole character, or remove it"
            ) from None
    return row


def _guessed_encoding(path: Path, note: Note) -> str:
    """The first of a few encodings that all of the file is in; what guesses among all is wrong too often."""
    with path.open("rb") as start:
        if start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
    for encoding, name in (("utf-8", "UTF-8"), ("cp1252", "windows-1252")):
        try:
            with path.open(encoding=encoding) as file:
                while text := file.read(CHUNK):
                    if "\0" in text:
                        raise ValueError("it has a zero byte, so it is no text")
        except UnicodeDecodeError:
            continue
        if encoding != "utf-8":
            note(f"{path.name} is not UTF-8: read as {name}; set `encoding` if it is another")
        return encoding
    raise ValueError("it is neither UTF-8 nor windows-1252; set `encoding`, such as latin-1")


def stream_lines(file: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    """The lines of UTF-8 text that cannot be read twice, each with its place, as soon as they are there.

    Raises:
        ValueError: a line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{name}, line {number}: not UTF-8") from None
        yield f"{name}, line {number}", text.rstrip("\r\n")


def _read_separated(path: Path, encoding: str | None, note: Note, delimiter: str | None = None) -> Iterator[Row]:
    # Python allows a cell no more than 128 KiB by default.
    csv.field_size_limit(2**31 - 1)
    with opened_text(path, encoding, note) as file:
        first = file.readline()
        if delimiter is None:
            delimiter = "," if "," in first else max(",;\t|", key=first.count)
            if delimiter != ",":
                note(f"{path.name} has no commas in its first line: read as separated by {delimiter!r}")
        records = _records(csv.reader(chain([first], file), delimiter=delimiter, strict=True))
        columns = [name.strip() for name in next(records, [])]
        for number, cells in enumerate(records, start=1):
            if len(cells) != len(columns):
                more = [str(row) for row, other in enumerate(records, start=number + 1) if len(other) != len(columns)]
                also = f"; so have other numbers of cells the rows {listed(more)}" if more else ""
                quote = "a double quote in it may not be closed" if any("\n" in cell for cell in cells) else ""
                raise ValueError(
                    f"{len(cells)} cells where the first line names {len(columns)} columns ({listed(columns)}); "
                    f"{quote or f'a cell with {delimiter!r} in it has to be in double quotes'}{also}"
                )
            yield _row([*zip(columns, cells, strict=True)])


def _records(reader: Any) -> Iterator[list[str]]:
    """The records of a table, without empty lines."""
    while True:
        start = reader.line_num + 1
        try:
            if cells := next(reader, None):
                yield cells
        except csv.Error as error:
            raise ValueError(
                f"the double quote that opens a cell in line {start} is not closed, or one within the cell is not "
                f'doubled (""): {error}'
            ) from None
        if cells is None:
            return


def _row(cells: Sequence[tuple[str, Any]]) -> Row:
    row = dict(cells)
    if len(row) < len(cells):
        name, _ = Counter(name for name, _ in cells).most_common(1)[0]
        raise ValueError(f"two columns have the name {name!r}; rename one of them")
    return row


def _read_json_lines(path: Path, encoding: str | None, note: Note) -> Iterator[Row]:
    with opened_text(path, encoding, note) as file:
        yield from (_object(json.loads(line, object_pairs_hook=_row)) for line in file if line.strip())


def _read_json(path: Path, encoding: str | None, note: Note) -> Iterator[Row]:
    with opened_text(path, encoding, note) as file:
        rows = json.load(file, object_pairs_hook=_row)
    if not isinstance(rows, list):
        raise ValueError("expected a list of rows, each an object; for one object a line name the file .jsonl")
    yield from map(_object, rows)


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with a value for each column, got {type(row).__name__}")
    return row


def _read_parquet(path: Path, encoding: str | None, note: Note) -> Iterator[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    # Not `read_table`, which takes the names of folders ("label=1") for columns.
    with parquet.ParquetFile(path) as file:
        _row([(name, None) for name in file.schema_arrow.names])
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _read_lines(path: Path, encoding: str | None, note: Note) -> Iterator[Row]:
    with opened_text(path, encoding, note) as file:
        yield from ({"text": line.rstrip("\n")} for line in file)


_READERS: dict[str, Callable[[Path, str | None, Note], Iterator[Row]]] = {
    ".csv": _read_separated,
    ".tsv": partial(_read_separated, delimiter="\t"),
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_lines,
}
