"""Runs at a time: none twice, the next as soon as one has ended, none after the end, and none outlives its parent."""

import argparse
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import read_rows
from benchmarks.running import go_on, rows_of

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Numbered:
    key: str


RUNS = [Numbered(str(number)) for number in range(5)]


def carried_out(run: Numbered) -> dict[str, Any]:
    return {"key": run.key, "seconds": 0.0}


def test_a_run_starts_as_soon_as_another_has_ended() -> None:
    others_are_done, rows = threading.Event(), dict[str, dict[str, Any]]()

    def carry_out(run: Numbered) -> dict[str, Any]:
        assert run.key != "0" or others_are_done.wait(30)
        return {"key": run.key}

    with ThreadPoolExecutor(2) as pool:
        for row in rows_of(pool, carry_out, lambda: [run for run in RUNS if run.key not in rows], 2, inf):
            assert row["key"] not in rows
            assert row["machine"].endswith(f", {os.cpu_count()} cores")
            rows[row["key"]] = row
            if len(rows) == 4:
                others_are_done.set()
    assert list(rows) == ["1", "2", "3", "4", "0"]


def test_no_run_starts_after_the_end() -> None:
    with ThreadPoolExecutor(2) as pool:
        assert not list(rows_of(pool, vars, lambda: RUNS, 2, 0.0))


def test_a_command_goes_on_where_its_file_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, chosen = tmp_path / "rows.json", argparse.Namespace(hours=1.0, processes=1)
    go_on(file, lambda rows: RUNS[:2], carried_out, lambda row: f"said {row['key']}", chosen)
    rows = go_on(file, lambda rows: RUNS[:3], carried_out, lambda row: f"said {row['key']}", chosen)
    assert read_rows(file) == rows
    assert list(rows) == ["0", "1", "2"]
    assert [capsys.readouterr().err.count(f"said {key}") for key in ("0",)] == [1]


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
