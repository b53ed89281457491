"""The runner of everything that trains: runs without a row, some at a time, each row in the file as soon as it is made.

Every process has one thread, none is idle while a run waits, and none outlives its parent.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Protocol, TypeVar

import torch
from torch.library import Library

from benchmarks.bfloat16 import multiply_in_float32_where_slow
from benchmarks.environment import machine
from benchmarks.results import Row, read_rows, write

_kept: list[Library | None] = []
"""What is in force until the process ends."""


class Keyed(Protocol):
    """A run that can be told from others."""

    @property
    def key(self) -> str:
        """Identifies the run."""


Run = TypeVar("Run", bound=Keyed)


def pool_of(processes: int) -> ProcessPoolExecutor:
    """New processes for runs."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_process)


def start_process() -> None:
    """Prepare a process for runs: one thread, so that several do not wait for each other; it ends with its parent."""
    torch.set_num_threads(1)
    _kept.append(multiply_in_float32_where_slow())
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def rows_of(
    pool: Executor, carry_out: Callable[[Run], Row], waiting: Callable[[], Iterable[Run]], at_once: int, end: float
) -> Iterator[Row]:
    """The rows of runs as they finish, with the machine; the next run starts as soon as one has.

    Args:
        waiting: the runs that can start, the most important first; asked again after every row, and those that are
            running may still be among them.
        at_once: how many run at a time.
        end: the time of `perf_counter` after which none starts.
    """
    running: dict[Future[Row], str] = {}
    while True:
        if perf_counter() < end:
            free = [run for run in waiting() if run.key not in running.values()]
            running |= {pool.submit(carry_out, run): run.key for run in free[: at_once - len(running)]}
        if not running:
            return
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            del running[done]
            yield done.result() | {"machine": machine()}


def go_on(
    file: Path,
    waiting: Callable[[dict[str, Row]], Iterable[Run]],
    carry_out: Callable[[Run], Row],
    said: Callable[[Row], str],
    chosen: argparse.Namespace,
) -> dict[str, Row]:
    """Carry out what has no row yet, until nothing is missing or the hours are over.

    Args:
        file: of the results; every finished run is in it at once.
        waiting: the runs that can start, the most important first, given the finished rows.
        carry_out: makes the row of a run, in a process of its own.
        said: what came out of a row, for a line on the terminal.
        chosen: `hours` and `processes`, as `options` reads them.

    Returns:
        All rows by their keys.
    """
    rows, end = read_rows(file), perf_counter() + chosen.hours * 3600
    with pool_of(chosen.processes) as pool:
        for row in rows_of(
            pool, carry_out, lambda: [run for run in waiting(rows) if run.key not in rows], chosen.processes, end
        ):
            rows[row["key"]] = row
            write(file, rows.values())
            print(
                f"{row['key']}: {row.get('error') or said(row)} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True
            )
    return rows


def options(program: str, description: str | None, file: Path | None = None) -> argparse.ArgumentParser:
    """The options of every command that trains.

    Args:
        program, description: of the command.
        file: of its results.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--hours", type=float, default=3.0, help="start no run after so many hours")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--output", type=Path, default=file, help="left out, the file in benchmarks/results/")
    return parser


def _end_with(parent: int) -> None:
    """End this process when its parent has, which may have been killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
