"""Doing something at one line of the library's own code, which is where threads and signals come between."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import dvora

LIBRARY = str(Path(dvora.__file__).parent)


@contextmanager
def at_line(number: int, action: Callable[[], object], files: Sequence[str] = ("",)) -> Iterator[list[int]]:
    """Call `action` at the line with that number, of those that this thread executes; what it raises is raised there.

    Args:
        number: 1 for the first.
        action: what comes between.
        files: names in the library, or beginnings of names, of the files whose lines are counted.

    Yields:
        A list that holds the lines so far.
    """
    count, places = [0], tuple(f"{LIBRARY}/{file}" for file in files)

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            count[0] += 1
            if count[0] == number:
                action()
        return local

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(places) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        yield count
    finally:
        sys.settrace(before)


def elsewhere(action: Callable[[], None]) -> None:
    """Do something in another thread, and wait for it."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()
