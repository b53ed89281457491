"""Ctrl-C at lines of the method's own code, one after the other, but none during the way back."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch import nn

import dvora

Act = Callable[[Any], object]
_FOLDER = str(Path(dvora.__file__).parent / "peft")


def interrupted(act: Act, model: nn.Module, config: pytest.Config) -> list[nn.Module]:
    """Copies of a model on which an action was interrupted, each at another line; with `--fuzz` at every line."""
    total, stopped = _lines_of(act, copy.deepcopy(model)), []
    for line in range(0, total, 1 if config.getoption("--fuzz") else max(1, total // 40)):
        stopped.append(copy.deepcopy(model))
        with pytest.raises(KeyboardInterrupt):
            _lines_of(act, stopped[-1], line)
    return stopped


def _lines_of(act: Act, model: nn.Module, stop: int | None = None) -> int:
    """How many lines of the method's files run in an action on a model; Ctrl-C comes at one of them."""
    count = 0

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            if count == stop:
                # A trace that raises is not called again.
                raise KeyboardInterrupt
            count += 1
        return step

    before = sys.gettrace()
    sys.settrace(lambda frame, _, __: step if frame.f_code.co_filename.startswith(_FOLDER) else None)
    try:
        act(model)
    finally:
        sys.settrace(before)
    return count
