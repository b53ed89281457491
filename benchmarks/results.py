"""Result files: what was measured on, and rows, one a line, so that a change of a file is read as a change of rows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]


def file_of(name: str) -> Path:
    """The committed result file of a benchmark."""
    return FOLDER / f"{name}.json"


def load(name: str) -> dict[str, Any]:
    """The content of a committed result file."""
    content: dict[str, Any] = json.loads(file_of(name).read_text(encoding="utf-8"))
    return content


def read_rows(file: Path) -> dict[str, Row]:
    """Rows by their keys; none where there is no file yet."""
    if not file.exists():
        return {}
    return {row["key"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def write(file: Path, rows: Iterable[Row], **head: Any) -> None:
    """Write a result file whole or not at all.

    Args:
        file: to write.
        rows: of the benchmark.
        **head: what stands before the rows, besides the environment.
    """
    before = json.dumps({"environment": environment(), **head, "rows": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    partial = file.with_suffix(".partial")
    partial.write_text(f"{before}[\n{lines}\n ]\n}}\n", encoding="utf-8")
    partial.replace(file)
