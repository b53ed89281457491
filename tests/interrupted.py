"""Ctrl-C at a given moment: before any line of the library that a call runs, one after the other."""

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import dvora

_LIBRARY = str(Path(dvora.__file__).parent)


def interrupted_at(moment: int, call: Callable[[], object], *, passing_over: str = "") -> bool:
    """Run a call with a `KeyboardInterrupt` before its line number `moment` that is of the library, from 0.

    Args:
        moment: the number of the line.
        call: what is run.
        passing_over: how lines begin that are not counted. A `with` line comes again when its block ends, before what
            it holds is given back: no signal is handled there, so of locks that would be another error than Ctrl-C is.

    Returns:
        Whether the call got so far.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(_LIBRARY):
            return None
        if event == "line" and not (passing_over and _text(frame).startswith(passing_over)):
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


def _text(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
