"""A batch in which every row has an adapter of its own, and which batch each thread is in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..restoring import surely

BASE = "__base__"
"""PEFT's name for "no adapter" in a batch of adapter names."""


class Batch:
    """One call of a model with an adapter for each row; compared by identity.

    Args:
        names: one a row.
        in_encoder: the names for the encoder, whose rows beam search does not repeat.
    """

    def __init__(self, names: Sequence[str], in_encoder: Sequence[str]) -> None:
        self.names = names
        self.in_encoder = in_encoder


class _Thread(threading.local):
    batch: Batch | None = None


_thread = _Thread()


@contextmanager
def in_progress(batch: Batch | None) -> Iterator[None]:
    """Make a batch, or None, the current one of this thread only."""
    if torch.compiler.is_compiling():
        # A compiled graph has no thread of its own.
        yield
        return
    before = _thread.batch

    def back() -> None:
        _thread.batch = before

    with surely(back):
        _thread.batch = batch
        yield


def is_in_progress(batch: Batch) -> bool:
    """Whether a batch is the current one of this thread."""
    return _thread.batch is batch


def mixed_outputs(
    x: Tensor, base_output: Tensor, adapter_names: Sequence[str], adapt: Callable[[Tensor, Tensor, list[str]], Tensor]
) -> Tensor:
    """The outputs of a batch, adapter by adapter.

    Args:
        x: inputs.
        base_output: of the base layer for all of them.
        adapter_names: one a row.
        adapt: maps inputs and base outputs of some rows to their outputs with the named adapters.
    """
    output = base_output.clone()
    for name in dict.fromkeys(adapter_names):
        if name != BASE:
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            output[rows] = adapt(x[rows], base_output[rows], [name])
    return output


def check_rows(adapter_names: Sequence[str], x: Tensor, merged: Sequence[str], name: str) -> None:
    """Refuse adapter names that do not fit the batch, or any while adapters are merged.

    Raises:
        ValueError: there is not one name a row, or an adapter is merged.
    """
    if len(adapter_names) != len(x):
        raise ValueError(
            f"{name}: adapter_names has {len(adapter_names)} entries, the batch has {len(x)} rows; pass one name a row"
        )
    if merged:
        raise ValueError(
            f"{name}: adapter_names cannot be used while adapters are merged ({', '.join(merged)}); call "
            "unmerge_adapter first"
        )
