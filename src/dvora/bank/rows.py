"""Which adapter each row of a batch has, in each thread, and the factors gathered for it.

A thread is in one batch at a time. Its rows are a tensor of slots, so that a compiled graph takes any mix of adapters
as it is; without a graph, the factors of a layer are gathered once a batch.

Dimensions: B rows of a batch, S slots, F values of a factor row, H of a head row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ..factors import Factors
from ..peft.restoring import surely
from ..tensors import Float, is_traced
from .factors import LayerPlace
from .served import ServedHead, ServedLayer


class Rows(Protocol):
    """The adapters of one batch, as the hooks of layers and heads ask for them."""

    dropout: nn.Module | None
    """Of the inputs of updates, where some are dropped."""

    def factors(self, layer: ServedLayer, place: LayerPlace, rows: int, dimensions: int) -> Factors:
        """The factors of a layer for a batch of so many rows, of tokens with so many dimensions."""

    def head(self, head: ServedHead, rows: int) -> dict[str, Tensor]:
        """The parameters of a head, each with one entry a row."""

    def of_base(self, rows: int, name: str) -> Tensor | None:
        """Which rows of a batch are the base's, (B,), as the module of that name has them; None where none can be."""


class CurrentRows(threading.local):
    """The batch that a thread is in; one object for each bank."""

    rows: Rows | None = None

    @contextmanager
    def entered(self, rows: Rows) -> Iterator[None]:
        """Make a batch the thread's.

        Raises:
            ValueError: the thread is in another one.
        """
        self.check_free()

        def leave() -> None:
            self.rows = None

        with surely(leave):
            self.rows = rows
            yield

    def check_free(self) -> None:
        """Refuse a second batch in this thread.

        Raises:
            ValueError: the thread is in one.
        """
        if self.rows is not None:
            raise ValueError("this thread is in a batch of the bank already; leave its `with` block first")

    def known(self) -> Rows:
        """The batch.

        Raises:
            ValueError: the thread is in none.
        """
        if self.rows is None:
            raise ValueError(
                "the model is in an AdapterBank and was called outside of bank.rows(...), so nobody said which adapter "
                "each row has; call it within `with bank.rows(names):`, where None names the base, or close the bank"
            )
        return self.rows


class RowIndex:
    """The place of each row's adapter in a matrix of all, also where generation repeats rows.

    Args:
        index: one a row, (B,).
        repeats: how often generation repeats each row, one after another.
    """

    def __init__(self, index: Tensor, repeats: int) -> None:
        self.index = index
        self.repeats = repeats
        self.repeated = index.repeat_interleave(repeats) if repeats > 1 else index

    def for_batch(self, rows: int, name: str) -> Tensor:
        """The index for a batch as a layer has it: an encoder's rows are not repeated.

        Raises:
            ValueError: there is not one name a row.
        """
        if rows == len(self.repeated):
            return self.repeated
        if rows == len(self.index):
            return self.index
        given = f"{len(self.index)} names" + (f", each repeated {self.repeats} times" if self.repeats > 1 else "")
        raise ValueError(
            f"{name}: bank.rows got {given}, and the layer a batch of {rows} rows; give one name a row, with "
            "repeats=num_beams (or num_return_sequences) where generation repeats rows. A layer that gets tokens "
            "without their rows (an expert's) cannot have an adapter for each row"
        )


class SlotRows:
    """Rows of adapters in slots.

    Args:
        index: the slot of each row.
        values: of all slots, (S, F).
        heads: the same of heads, (S, H).
        places: of all layers in F.
    """

    dropout: nn.Module | None = None

    def __init__(
        self, index: RowIndex, values: Float[Tensor, "S F"], heads: Float[Tensor, "S H"], places: Sequence[LayerPlace]
    ) -> None:
        self.index, self.values, self.heads, self.places = index, values, heads, places
        self._gathered: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, int], dict[int, Factors]] = {}

    def factors(self, layer: ServedLayer, place: LayerPlace, rows: int, dimensions: int) -> Factors:
        """The factors of a layer: a part of what is gathered and split once a batch, for the whole model."""
        if is_traced():
            values = self.values[:, place.start : place.stop].index_select(0, self.index.for_batch(rows, layer.name))
            return Factors.of_rows(values.to(layer.adapted.w.dtype), place.rank, dimensions)
        key = rows, dimensions
        if key not in self._factors:
            # Inference tensors could not be used in a later pass with gradients.
            with torch.inference_mode(False), torch.no_grad():
                if rows not in self._gathered:
                    gathered = self.values.index_select(0, self.index.for_batch(rows, layer.name))
                    self._gathered[rows] = gathered.to(layer.adapted.w.dtype)
                values = self._gathered[rows].view(rows, *(1,) * (dimensions - 2), -1)
                parts = iter(values.split([n for each in self.places for n in each.lengths], -1))
                self._factors[key] = {
                    each.start: Factors(next(parts), next(parts), next(parts)) for each in self.places
                }
        return self._factors[key][place.start]

    def head(self, head: ServedHead, rows: int) -> dict[str, Tensor]:
        """The parameters of a head."""
        return head.of_rows(self.heads.index_select(0, self.index.for_batch(rows, head.name)))

    def of_base(self, rows: int, name: str) -> Tensor:
        """Which rows are the base's, which has the last slot."""
        return self.index.for_batch(rows, name) == len(self.values) - 1


def check_names(names: Sequence[str | None], repeats: int) -> None:
    """Refuse what cannot name the rows of a batch.

    Raises:
        TypeError, ValueError: it is no list of names, or a number is out of range.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list with one name a row, got {names!r}")
    if wrong := [name for name in names if not (name is None or isinstance(name, str))]:
        raise TypeError(f"names must be strings, or None for the base, got {wrong[0]!r}")
    if not names:
        raise ValueError("names is empty; give one name a row of the batch")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be a positive integer, got {repeats!r}")
