"""Reading files: every cell as it is written, whatever the encoding, and damage is reported with its row."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dvora.recipes.data.tables import read_text, stream_table

CELLS = [
    {"text": "schön, „gut“", "label": "ja"},
    {"text": 'a "quoted"\nsecond line', "label": "nein"},
    # What libraries take for missing, for numbers, for dates, or for the end of a line.
    {"text": "NA", "label": "001"},
    {"text": "null", "label": "1e3"},
    {"text": "2020-01-01", "label": "123456789012345678901"},
    {"text": " a\u2028b\u200b ", "label": "None"},
]
CSV = "text,label\n" + "".join('"{}",{}\n'.format(row["text"].replace('"', '""'), row["label"]) for row in CELLS)


def written(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, encoding: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the notes on what had to be assumed."""
    notes: list[str] = []
    return [row for _, row in stream_table(path, encoding, notes.append)], notes


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_cell_is_read_as_it_is_written(tmp_path: Path, encoding: str, line_end: str) -> None:
    path = written(tmp_path, "[a]* ü::b.csv", CSV.replace("\n", line_end).encode(encoding))
    assert read(path) == (CELLS, [])


def test_all_formats_hold_the_same_cells(tmp_path: Path) -> None:
    written(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in CELLS))
    written(tmp_path, "a.json", json.dumps(CELLS))
    parquet.write_table(pyarrow.Table.from_pylist(CELLS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert read(tmp_path / name) == (CELLS, [])


def test_values_of_json_keep_their_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": 1, "b": None},
        {"a": 2.5},
        {"a": "x", "c": [{"d": "2020-01-01"}, {"e": 10**30}]},
    ]
    assert repr(read(written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))[0]) == repr(rows)


def test_what_is_not_utf_8_is_told_or_read_as_it_is_said_to_be(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nok,1\nschön,2\n".encode("cp1252"))
    rows, notes = read(path)
    assert rows[1]["text"] == "schön"
    assert notes == ["a.csv is not UTF-8: read as windows-1252; set `encoding` if it is another"]
    path = written(tmp_path, "b.csv", "text,label\nok,1\nжизнь,2\n".encode("koi8-r"))
    assert read(path, "koi8-r")[0][1]["text"] == "жизнь"
    for encoding, message in (("ascii", "codec can't decode"), ("klingon", "unknown encoding: klingon")):
        with pytest.raises(ValueError, match=rf"b\.csv, row 1: .*{message}"):
            read(path, encoding)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", " \n\n", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,text\na,b\n", "row 1: two columns have the name 'text'"),
        ("a.csv", "text,label\na,b\nc\n", "row 2: 1 cells where the first line names 2"),
        ("a.csv", "text,label\na,b,1\nc,d,1\n", "row 1: 3 cells .* in double quotes"),
        (
            "a.csv",
            'text,label\na,b\n"open,1\nd,2\n',
            "row 2: the double quote that opens a cell in line 3 is not closed.*unexpected end of data",
        ),
        (
            "a.csv",
            'text,label\na,b\n"open,1\nd,2\ne,"f"\n',
            "row 2: the double quote .* line 3.*',' expected after '\"'",
        ),
        ("a.csv", "text,label\na\0,b\n", "row 1: it has a zero byte"),
        ("a.csv", b"text,label\na\x81,b\n", "row 1: it is neither UTF-8 nor windows-1252"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "row 2: Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "row 2: expected an object"),
        ("a.jsonl", '{"a": 1, "b": 2, "a": 3}', "row 1: two columns have the name 'a'"),
        ("a.jsonl", "[" * 100_000, "row 1: maximum recursion depth"),
        (
            "a.jsonl",
            '{"a": "\\ud83d\\ude00"}\n{"a": "b \\ud83d"}',
            r"row 2: column 'a' holds '\\ud83d', half of a char",
        ),
        ("a.jsonl", '{"a": 1}\n{"\\ud83d": 1}', r"row 2: column '\\ud83d' holds '\\ud83d', half of a character"),
        ("a.json", '[{"a": 1}, {"a": [{"b": "\\ude00"}]}]', r"row 2: column 'a' holds '\\ude00', half of a character"),
        ("a.json", '{"a": 1}', "expected a list of rows"),
        ("a.json", "[]", "has no rows"),
        ("a.parquet", "text", "row 1: Parquet"),
        ("a.cvs", "x", "names no format that is read here, did you mean '.csv'"),
        ("a.xlsx", "x", "'.xlsx' names no format"),
    ],
)
def test_a_damaged_file_is_reported_with_its_row(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(written(tmp_path, name, content))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
def test_an_encoding_that_has_half_a_character_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, b"text\nb\n+2AA-")
    with pytest.raises(ValueError, match=rf"{name}, row {3 - (name != 'a.txt')}: column 'text' holds '\\ud800', half"):
        read(path, "utf-7")
    with pytest.raises(ValueError, match=rf"{name}: column 'text' holds '\\ud800', half"):
        read_text(path, "utf-7", str)


def test_a_field_of_megabytes_is_read(tmp_path: Path) -> None:
    rows, _ = read(written(tmp_path, "a.csv", f"text,label\n{'x' * 3_000_000},1\n"))
    assert len(rows[0]["text"]) == 3_000_000


@pytest.mark.parametrize(
    ("name", "delimiter", "noted"), [("a.csv", ";", True), ("a.csv", "\t", True), ("a.tsv", "\t", False)]
)
def test_other_delimiters(tmp_path: Path, name: str, delimiter: str, noted: bool) -> None:
    rows, notes = read(written(tmp_path, name, f"text{delimiter}label\na, b{delimiter}1\n"))
    assert rows == [{"text": "a, b", "label": "1"}]
    assert bool(notes) == noted


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    # Any other error fails the test.
    with suppress(ValueError):
        read(written(tmp_path_factory.getbasetemp(), "any.csv", content))


def test_two_columns_of_one_name_are_refused_in_parquet_too(tmp_path: Path) -> None:
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: two columns have the name 'text'"):
        read(tmp_path / "a.parquet")
