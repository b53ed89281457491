"""The one way back after an error or an interruption: PEFT replaces layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def surely(end: Callable[[], object]) -> Iterator[None]:
    """Call `end` at the end of the block, and once more in case an interruption stopped it.

    Args:
        end: may be called again at any point.
    """
    try:
        try:
            yield
        finally:
            end()
    finally:
        end()


@contextmanager
def on_failure(*undo: Callable[[], object]) -> Iterator[None]:
    """Call all of `undo` if the block raises anything, interruptions included.

    Args:
        undo: may be called again at any point.
    """
    finished: list[bool] = []

    def end() -> None:
        if not finished:
            for each in undo:
                each()

    with surely(end):
        yield
        finished.append(True)


def values_as_they_are(tensors: list[Tensor]) -> Callable[[], None]:
    """A function that restores the present values of tensors, from copies."""
    kept = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)

    return restore
