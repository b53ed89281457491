"""Runs at a time: none twice, and none outlives its parent."""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import read_rows, write
from benchmarks.running import go_on

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Numbered:
    key: str


RUNS = [Numbered(str(number)) for number in range(5)]


def carried_out(run: Numbered) -> dict[str, Any]:
    return {"key": run.key, "seconds": 0.0}


def test_a_command_goes_on_where_its_file_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, chosen = tmp_path / "rows.json", argparse.Namespace(hours=1.0, processes=1)
    write(file, map(carried_out, RUNS[:2]))
    rows = go_on(file, lambda rows: RUNS[:3], carried_out, lambda row: f"said {row['key']}", chosen)
    assert read_rows(file) == rows
    assert list(rows) == ["0", "1", "2"]
    said = capsys.readouterr().err
    assert ("said 1" in said, "said 2" in said) == (False, True)


def test_processes_end_with_their_parent() -> None:
    """The parent is killed while its process is in a run."""
    code = (
        "import os, time\n"
        "from benchmarks.running import pool_of\n"
        "pool = pool_of(1)\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.submit(time.sleep, 600)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{int(parent.stdout.readline())}")
        assert child.exists()
        parent.kill()
    end = time.monotonic() + 30
    while child.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert not child.exists()
