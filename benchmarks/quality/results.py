"""The result file: what was measured on, and a row for each finished run, written anew after every run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

FOLDER = Path(__file__).parent.parent / "results"
RESULT = FOLDER / "quality.json"
EQUAL_BYTES = FOLDER / "equal_bytes.json"


def result_file(grid: Path) -> Path:
    """The result file of a grid's file."""
    return FOLDER / f"{grid.stem}.json"


def read_rows(file: Path = RESULT) -> dict[str, dict[str, Any]]:
    """Rows by the key of their run; none where there is no file yet."""
    if not file.exists():
        return {}
    return {row["key"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def write_rows(rows: Sequence[dict[str, Any]], file: Path = RESULT) -> None:
    """All rows, one a line, so that a change of the file is read as a change of rows."""
    head = json.dumps({"environment": environment(), "rows": []}, indent=2).removesuffix("[]\n}")
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    partial = file.with_suffix(".partial")
    partial.write_text(f"{head}[\n{lines}\n  ]\n}}\n", encoding="utf-8")
    partial.replace(file)
