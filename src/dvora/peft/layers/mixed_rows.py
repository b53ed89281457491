"""A batch in which every row has an adapter of its own, and which batch each thread is in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...factors import Factors
from ...tensors import Float, grad_recorded, is_traced
from ...weight import AdaptedWeight
from ..restoring import surely

BASE = "__base__"
"""PEFT's name for "no adapter" in a batch of adapter names."""


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer, or those of the rows of a batch, which share A and B."""

    adapted: AdaptedWeight
    factors: Factors
    dropout: nn.Module | None
    """Of the inputs of the update; None where nothing is dropped."""


class Batch:
    """One call of a model with an adapter for each row; compared by identity.

    Args:
        names: one a row.
        in_encoder: the names for the encoder, whose rows beam search does not repeat.
    """

    def __init__(self, names: Sequence[str], in_encoder: Sequence[str]) -> None:
        self.names = names
        self.in_encoder = in_encoder
        self.updates: dict[tuple[int, int, int], list[RowUpdate]] = {}
        """Without gradients, of every layer: generation asks for them with each token, and goes on as it began."""


class RowUpdate(NamedTuple):
    """What adapters that share A and B do to the outputs of one layer."""

    rows: list[int] | None
    """Their rows; None if they are all."""
    adapter: ActiveAdapter


class _Thread(threading.local):
    batch: Batch | None = None


this_thread = _Thread()


@contextmanager
def in_progress(batch: Batch | None) -> Iterator[None]:
    """Make a batch, or None, the current one of this thread only."""
    if torch.compiler.is_compiling():
        # A compiled graph has no thread of its own.
        yield
        return
    before = this_thread.batch

    def back() -> None:
        this_thread.batch = before

    with surely(back):
        this_thread.batch = batch
        yield


def updates_in(
    layer: object, adapter_names: Sequence[str], dimensions: int, make: Callable[[], list[RowUpdate]]
) -> list[RowUpdate]:
    """The updates of a layer, made once in a call of the model that is not differentiated.

    Args:
        layer: compared by identity.
        adapter_names: one a row.
        dimensions: of the layer's outputs.
        make: makes them.
    """
    batch = None if is_traced() or grad_recorded() else this_thread.batch
    if batch is None or (adapter_names is not batch.names and adapter_names is not batch.in_encoder):
        return make()
    key = id(layer), id(adapter_names), dimensions
    if key not in batch.updates:
        batch.updates[key] = make()
    return batch.updates[key]


def is_in_progress(batch: Batch) -> bool:
    """Whether a batch is the current one of this thread."""
    return this_thread.batch is batch


def mixed_outputs(
    x: Tensor,
    base_output: Tensor,
    updates: Sequence[RowUpdate],
    adapt: Callable[[Tensor, Tensor, Sequence[ActiveAdapter]], Tensor],
) -> Tensor:
    """The outputs of a batch: of all rows at once, or for each A and B where there are several.

    Args:
        x: inputs.
        base_output: of the base layer for all of them; rows without an update keep theirs.
        updates: of the layer.
        adapt: maps inputs and base outputs to the outputs with adapters.
    """
    if len(updates) == 1 and updates[0].rows is None:
        return adapt(x, base_output, [updates[0].adapter])
    output = base_output.clone() if updates else base_output
    if not updates:
        return adapt(x, base_output, [])
    for rows, adapter in updates:
        output[rows] = adapt(x[rows], base_output[rows], [adapter])
    return output


def row_updates(
    adapted: Mapping[str, AdaptedWeight],
    factor_rows: Callable[[Sequence[str]], Tensor],
    adapter_names: Sequence[str],
    dimensions: int,
) -> list[RowUpdate]:
    """The updates of a layer by row.

    Args:
        adapted: the frozen sides of the adapters in the batch that the layer has, by name.
        factor_rows: maps names of them to their factors, (N, F), as of `Factors.row`.
        adapter_names: one a row.
        dimensions: of the layer's outputs.
    """
    groups: dict[tuple[object, ...], dict[str, AdaptedWeight]] = {}
    for name, one in adapted.items():
        groups.setdefault(one.update_key, {})[name] = one
    found = []
    for group in groups.values():
        rows = None if len(groups) == 1 else [row for row, name in enumerate(adapter_names) if name in group]
        names = list(adapter_names) if rows is None else [adapter_names[row] for row in rows]
        found.append(RowUpdate(rows, _by_row(group, factor_rows(list(group)), names, dimensions)))
    return found


def _by_row(
    group: Mapping[str, AdaptedWeight], factor_rows: Float[Tensor, "N F"], adapter_names: Sequence[str], dimensions: int
) -> ActiveAdapter:
    """Adapters that share A and B, each for its rows of tokens with this many dimensions."""
    adapted = next(iter(group.values()))
    if list(group) != adapter_names:
        place = {name: place for place, name in enumerate(group)}
        # The row behind them is the base's.
        index = [place.get(name, len(group)) for name in adapter_names]
        factor_rows = pad(factor_rows, (0, 0, 0, 1))[torch.tensor(index, device=factor_rows.device)]
    return ActiveAdapter(adapted, Factors.of_rows(factor_rows, adapted.rank, dimensions), None)


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
