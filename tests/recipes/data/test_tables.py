"""Reading files: every encoding and line end gives the same rows, and damage is reported with its line."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dvora.recipes.data.tables import read_table, read_text

ROWS = [{"text": "schön, „gut“", "label": "ja"}, {"text": 'a "quoted"\nsecond line', "label": "nein"}]
CSV = 'text,label\n"schön, „gut“",ja\n"a ""quoted""\nsecond line",nein\n'


def written(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings_and_line_ends_give_the_same_rows(tmp_path: Path, encoding: str, line_end: str) -> None:
    table = read_table(written(tmp_path, "a.csv", CSV.replace("\n", line_end).encode(encoding)))
    assert list(table.rows) == ROWS
    assert table.places == ("line 2", "line 3")
    assert bool(table.notes) == (encoding == "cp1252")


def test_another_encoding_is_reported_with_its_line_or_obeyed(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\nok,1\nжизнь,2\n".encode("koi8-r"))
    assert "is not UTF-8 (line 3): read as windows-1252" in read_table(path).notes[0]
    assert read_table(path, "koi8-r").rows[1]["text"] == "жизнь"
    with pytest.raises(ValueError, match="line 3: not ascii"):
        read_table(path, "ascii")
    with pytest.raises(ValueError, match="encoding 'klingon' is unknown"):
        read_table(path, "klingon")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", " \n\n", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,text\na,b\n", "the column 'text' occurs twice"),
        ("a.csv", "text,label\na,b\nc\n", "line 3: 1 fields where the first line names 2"),
        ("a.csv", "text,label\na,b\nc, d,1\n", "line 3: 3 fields .* in double quotes"),
        ("a.csv", 'text,label\na,b\n"open,1\nd,2\n', "line 3: .*is a double quote left open"),
        ("a.csv", "text,label\na\0,b\n", "zero byte in line 2"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: expected an object"),
        ("a.json", '{"a": 1}', "expected a list of rows"),
        ("a.json", "[]", "has no rows"),
        ("a.parquet", "text", "not a parquet file"),
        ("a.cvs", "x", "did you mean '.csv'"),
        ("a.xlsx", "x", "'.xlsx' names no format"),
    ],
)
def test_a_damaged_file_is_reported_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_table(written(tmp_path, name, content))
    assert name in str(error.value)


def test_a_field_of_megabytes_is_read(tmp_path: Path) -> None:
    table = read_table(written(tmp_path, "a.csv", f"text,label\n{'x' * 3_000_000},1\n"))
    assert len(table.rows[0]["text"]) == 3_000_000


@pytest.mark.parametrize(
    ("name", "delimiter", "noted"), [("a.csv", ";", True), ("a.csv", "\t", True), ("a.tsv", "\t", False)]
)
def test_other_delimiters(tmp_path: Path, name: str, delimiter: str, noted: bool) -> None:
    table = read_table(written(tmp_path, name, f"text{delimiter}label\na, b{delimiter}1\n"))
    assert table.rows == ({"text": "a, b", "label": "1"},)
    assert bool(table.notes) == noted


def test_all_formats_hold_the_same_rows(tmp_path: Path) -> None:
    # U+2028 ends a line for str.splitlines, and for nobody else.
    rows: list[dict[str, Any]] = [*ROWS, {"text": "a\u2028b", "label": "x"}]
    written(tmp_path, "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    written(tmp_path, "a.json", json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert list(read_table(tmp_path / name).rows) == rows


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.getbasetemp(), "any.csv", content)
    for read in (read_table, read_text):
        # Any other error fails the test.
        with suppress(ValueError):
            read(path)
