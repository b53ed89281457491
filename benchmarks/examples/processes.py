"""Runs a command with a time limit, and leaves none of the processes that it started, or that those started, behind."""

import contextlib
import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

GRACE_SECONDS = 5
"""How long processes may outlive the command before they count as left behind."""
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        status: its exit status; None where the limit was reached.
        seconds: it ran.
        stdout, stderr: what it and its children wrote.
        killed: names of processes that it left behind when it ended by itself.
    """

    status: int | None
    seconds: float
    stdout: str
    stderr: str
    killed: tuple[str, ...]


def run(command: Sequence[str], limit_seconds: float, folder: Path) -> Ended:
    """Run a command in a folder until it ends or the limit is reached; nothing it started is alive afterwards."""
    # Files, not pipes: a process left behind would hold a pipe open, and the reader would wait for it.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr, _adopted_orphans():
        before = set(psutil.Process().children(recursive=True))
        start = time.monotonic()
        # A session of its own: the terminal's interrupt reaches this process alone, which then ends the others.
        process = subprocess.Popen(command, cwd=folder, stdout=stdout, stderr=stderr, start_new_session=True)
        grace, status = 0.0, None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=limit_seconds)
                grace = GRACE_SECONDS
            seconds = time.monotonic() - start
        finally:
            killed = _end_all(before, grace)
            process.wait()
        return Ended(status, seconds, _text(stdout), _text(stderr), () if status is None else tuple(killed))


def _end_all(before: set[psutil.Process], grace: float) -> list[str]:
    """Wait for this process's new descendants, kill those that stay, and name them."""
    killed = []
    _, alive = psutil.wait_procs(_descendants(before), timeout=grace)
    while alive:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    killed.append(process.name())
                process.kill()
        psutil.wait_procs(alive, timeout=GRACE_SECONDS)
        # What was started while the others were being killed.
        alive = _descendants(before)
    return killed


def _descendants(before: set[psutil.Process]) -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if process not in before]


@contextlib.contextmanager
def _adopted_orphans() -> Iterator[None]:
    """On Linux, a process whose parent ends becomes a child of this one, so that none gets out of sight."""
    if not sys.platform.startswith("linux"):
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _text(file: "tempfile._TemporaryFileWrapper[bytes]") -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")
