"""Doing something at one line of the library's own code, which is where threads and signals come between."""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import dvora

LIBRARY = str(Path(dvora.__file__).parent)
LOST_IN = "forget"
"""A function that the collector calls, from which no exception comes out."""


@contextmanager
def at_line(number: int, action: Callable[[], object], files: Sequence[str] = ("",)) -> Iterator[list[int | bool]]:
    """Call `action` at the line with that number, of those that this thread executes; what it raises is raised there.

    Or soon after: no signal comes between the body of a `with` and its exit, and none within what the collector calls.

    Args:
        number: 1 for the first.
        action: what comes between.
        files: names in the library, or beginnings of names, of the files whose lines are counted.

    Yields:
        A list that holds the lines so far, and then whether the action was called.
    """
    # A file that was renamed would silently be left out.
    assert all(any(Path(LIBRARY).glob(f"{file}*")) for file in files if file), files
    count, places, done = [0], tuple(f"{LIBRARY}/{file}" for file in files), False

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal done
        if event == "line":
            count[0] += 1
            if count[0] >= number > 0 and not done and frame.f_lineno not in _withs(frame.f_code.co_filename):
                done = True
                action()
        return local

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        return local if code.co_filename.startswith(places) and code.co_name != LOST_IN else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        yield count
    finally:
        sys.settrace(before)
        count.append(done)


@cache
def _withs(path: str) -> frozenset[int]:
    """The lines of `with` statements in a file, to which execution returns when it leaves them."""
    nodes = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.With)]
    return frozenset(line for node in nodes for line in range(node.lineno, node.body[0].lineno))


def elsewhere(action: Callable[[], None]) -> None:
    """Do something in another thread, and wait for it."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()
