"""Which forward pass of a model a thread is in."""

import threading


class Pass:
    """One forward pass of one model in one thread, compared by identity.

    Args:
        model: what stands for the model.
    """

    def __init__(self, model: object) -> None:
        self.model = model
        self.asked: dict[int, object] = {}
        """What layers have asked for in it."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.passes: list[Pass] = []


_running = _Running()


def enter(begun: Pass) -> None:
    """Make a pass the current one of this thread.

    PyTorch runs no hooks when a pass is interrupted from the keyboard, so that may have left an earlier pass of the
    model behind. A pass within a pass of the same model ends that one too: its other layers are then in no pass.
    """
    leave(begun.model)
    _running.passes.append(begun)


def leave(model: object) -> None:
    """End the pass of a model in this thread, and those within it."""
    for index, running in enumerate(_running.passes):
        if running.model is model:
            del _running.passes[index:]
            return


def current_pass() -> Pass | None:
    """The pass that this thread is in; None where none was entered."""
    return _running.passes[-1] if _running.passes else None
