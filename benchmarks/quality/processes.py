"""Processes that carry out runs: one thread each, none idle while a run waits, and none outlives its parent."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from time import perf_counter
from typing import Any, Protocol, TypeVar

import torch

from benchmarks.environment import machine

Row = dict[str, Any]


class Keyed(Protocol):
    """A run that can be told from others."""

    @property
    def key(self) -> str:
        """Identifies the run."""


Run = TypeVar("Run", bound=Keyed)


def pool_of(processes: int, nice: int = 0) -> ProcessPoolExecutor:
    """New processes for runs, with a priority that is lower by so much."""
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_process, initargs=(nice,))


def start_process(nice: int) -> None:
    """Prepare a process for runs: one thread, so that several do not wait for each other; it ends with its parent."""
    torch.set_num_threads(1)
    os.nice(nice)
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


def in_a_fresh_process(function: Callable[..., Row], *arguments: Any) -> Row:
    """A row that is made in a new process, which keeps nothing of an earlier run: memory, state of libraries."""
    with pool_of(1) as alone:
        return alone.submit(function, *arguments).result()


def _end_with(parent: int) -> None:
    """End this process when its parent has, which may have been killed: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
