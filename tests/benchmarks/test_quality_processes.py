"""Runs at a time: none twice, the next as soon as one has ended, none after the end, and a killed one is an error."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest

from benchmarks.quality.processes import in_a_fresh_process, rows_of


@dataclass(frozen=True)
class Numbered:
    key: str


RUNS = [Numbered(str(number)) for number in range(5)]


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


def test_a_process_that_is_killed_is_an_error() -> None:
    assert in_a_fresh_process(dict, {"pid": 1}) == {"pid": 1}
    with pytest.raises(BrokenProcessPool):
        in_a_fresh_process(os._exit, 1)
