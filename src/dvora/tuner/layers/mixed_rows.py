"""A batch in which every row has an adapter of its own, and which batch each thread is in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...method.packed_factors import PackedFactors
from ...weight.linear import Update
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
    x: Tensor,
    base_output: Tensor,
    adapter_names: Sequence[str],
    updates: Mapping[str, Update],
    adapt: Callable[[Tensor, Tensor, Update], Tensor],
) -> Tensor:
    """The outputs of a batch: of all rows at once, or for each A and B where there are several.

    Args:
        x: inputs.
        base_output: of the base layer for all of them.
        adapter_names: one a row.
        updates: of the adapters that the layer has, by name; other rows get the base's outputs.
        adapt: maps inputs and base outputs to the outputs with an update by row.
    """
    groups: dict[tuple[object, ...], dict[str, Update]] = {}
    for name, update in updates.items():
        shared = update.adapted.shared
        key = shared.seed, shared.distribution, shared.use_triton, update.adapted.rank
        groups.setdefault(key, {})[name] = update
    if len(groups) == 1:
        return adapt(x, base_output, _by_row(updates, adapter_names, base_output.dim()))
    output = base_output.clone() if groups else base_output
    for group in groups.values():
        rows = [row for row, name in enumerate(adapter_names) if name in group]
        update = _by_row(group, [adapter_names[row] for row in rows], base_output.dim())
        output[rows] = adapt(x[rows], base_output[rows], update)
    return output


def _by_row(updates: Mapping[str, Update], adapter_names: Sequence[str], dimensions: int) -> Update:
    """The updates of adapters that share A and B, each for its rows of tokens with this many dimensions."""
    packed = [update.factors.packed for update in updates.values()]
    place = {name: place for place, name in enumerate(updates)}
    if not all(name in place for name in adapter_names):
        packed.append(PackedFactors.of_base(packed[0]))
    index = torch.tensor([place.get(name, len(place)) for name in adapter_names], device=packed[0].lambda_d.device)
    adapted = next(iter(updates.values())).adapted
    return Update.by_row(adapted, PackedFactors.stacked(packed).gathered(index, dimensions))


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
