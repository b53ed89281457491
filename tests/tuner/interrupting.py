"""Interruptions at every step of this library's own code: what Ctrl-C does, but at a place that a test chooses."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import dvora

_TUNER = str(Path(dvora.__file__).parent / "tuner")


def steps_of(act: Callable[[Any], object], model: object, opcodes: bool) -> int:
    """How many lines, or instructions, of the tuner's files run in an action on a model."""
    return _traced(partial(act, model), None, opcodes)


def interrupted_at(step: int, act: Callable[[Any], object], model: object, opcodes: bool) -> None:
    """Interrupt an action on a model at a step.

    Raises:
        KeyboardInterrupt: unless the action takes fewer steps.
    """
    _traced(partial(act, model), step, opcodes)


def _traced(act: Callable[[], object], stop: int | None, opcodes: bool) -> int:
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == ("opcode" if opcodes else "line"):
            if count == stop:
                # A trace that raises is not called again.
                raise KeyboardInterrupt
            count += 1
        return step

    def enter(frame: FrameType, _: str, __: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_TUNER):
            return None
        frame.f_trace_opcodes = opcodes
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        act()
    finally:
        sys.settrace(before)
    return count
