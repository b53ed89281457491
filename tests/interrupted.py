"""Ctrl-C at a given moment: before any line of the library that a call runs, one after the other."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import dvora

_LIBRARY = str(Path(dvora.__file__).parent)


def interrupted_at(moment: int, call: Callable[[], object]) -> bool:
    """Run a call with a `KeyboardInterrupt` before its line number `moment` that is of the library, from 0.

    Returns:
        Whether the call got so far.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return None
        if event == "line":
            lines += 1
            if lines > moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False
