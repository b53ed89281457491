"""Rows as text: read back as they were written, one at a time."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from dvora.recipes.data.tables import stream_table
from dvora.recipes.data.writers import writer_for

ROWS = [{"text": 'schön, "gut"\nund\tlang', "n": "1"}, {"text": "", "n": "a\u2028b"}]


@pytest.mark.parametrize("suffix", [".tsv", ".ndjson", ".CSV"])
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes("".join(writer_for(suffix)(ROWS)).encode())
    assert [row for _, row in stream_table(path, None, print)] == ROWS


def test_a_row_is_written_when_it_is_known() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"a": 1}
        raise AssertionError("nobody asked for a second row")

    assert next(writer_for(".jsonl")(rows())) == '{"a": 1}\n'
    assert [*islice(writer_for(".csv")(rows()), 2)] == ["a\n", "1\n"]


def test_values_that_are_no_text() -> None:
    assert "".join(writer_for(".csv")([{"a": [1, "é"], "b": None, "c": True, "d": 0.5}])) == (
        'a,b,c,d\n"[1, ""é""]",,true,0.5\n'
    )


def test_a_table_keeps_the_columns_of_its_first_row() -> None:
    assert "".join(writer_for(".csv")([{"a": 1, "b": 2}, {"b": 3}])) == "a,b\n1,2\n,3\n"
    with pytest.raises(ValueError, match=r"row 2 has 'c', which the first row lacks.*write \.jsonl"):
        list(writer_for(".csv")([{"a": 1}, {"a": 2, "c": 3}]))
