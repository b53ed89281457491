"""Which forward pass of a model a thread is in."""

import threading


class Pass:
    """One forward pass of one model in one thread, compared by identity."""

    def __init__(self) -> None:
        self.asked: dict[int, object] = {}
        """What layers have asked for in it."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[Pass] = []


_running = _Running()


def enter(entered: Pass) -> None:
    """Make a pass the current one of this thread."""
    _running.passes.append(entered)


def leave(left: Pass) -> None:
    """End a pass, and those within it that were interrupted."""
    if left in _running.passes:
        del _running.passes[_running.passes.index(left) :]


def current_pass() -> Pass | None:
    """The pass that this thread is in; None outside a model with a `FactorPass`."""
    return _running.passes[-1] if _running.passes else None
