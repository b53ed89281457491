"""The one way back after an error or an interruption: PEFT replaces layers one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set)


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


def modules_as_they_are(model: nn.Module) -> Callable[[], None]:
    """A function that restores the present attributes and children of every module, and which parameters are trained.

    Values of tensors are not restored.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = [
        (each, each.copy()) for _, kept in attributes for each in kept.values() if isinstance(each, _CONTAINERS)
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for changed, kept in [*attributes, *contents]:
            _put_back(changed, kept)
        for parameter, requires_grad in trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    return restore


def values_as_they_are(tensors: list[Tensor]) -> Callable[[], None]:
    """A function that restores the present values of tensors, from copies."""
    kept = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)

    return restore


def _put_back(changed: Any, kept: Any) -> None:
    """Restore the contents of a container; an unchanged one is not written, as other threads may be reading it."""
    if isinstance(changed, dict):
        if list(changed) != list(kept) or any(changed[key] is not value for key, value in kept.items()):
            changed.clear()
            changed.update(kept)
    elif isinstance(changed, list):
        if [id(each) for each in changed] != [id(each) for each in kept]:
            changed[:] = kept
    elif changed != kept:
        changed.clear()
        changed.update(kept)
