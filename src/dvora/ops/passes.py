"""Which forward pass of a model a thread is in."""

import threading
from typing import Any


class Pass:
    """One forward pass of one model in one thread, compared by identity."""

    def __init__(self) -> None:
        self.asked: dict[int, object] = {}
        """What layers have asked for in it."""
        self.projected: Any = None
        """The last projection of an input, without gradients."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[tuple[object, Pass]] = []
        """Each with what began it."""


_running = _Running()


def enter(owner: object, entered: Pass) -> None:
    """Make a pass the current one of this thread.

    Args:
        owner: of the pass, compared by identity.
        entered: the pass.
    """
    _running.passes.append((owner, entered))


def leave(owner: object) -> None:
    """End all passes of an owner in this thread, and those within them.

    There is more than one where a pass was interrupted from the keyboard, since PyTorch then runs no hooks, and where
    one has called its own model in the middle: what remains of that one goes on outside of any pass.
    """
    for index, (of, _) in enumerate(_running.passes):
        if of is owner:
            for _, left in _running.passes[index:]:
                left.projected = None
            del _running.passes[index:]
            return


def current_pass() -> Pass | None:
    """The pass that this thread is in; None outside a model with a `FactorPass`."""
    return _running.passes[-1][1] if _running.passes else None
