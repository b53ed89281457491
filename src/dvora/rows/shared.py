"""What rows of a batch have in common is computed once.

Models run through lists of blocks. Rows that come to the first block with the same values stay the same for as long as
their adapters change nothing: sixteen classifiers of one text need the blocks below their adapters once. So a block
gets one row for each group of equal ones, and its outputs are repeated for all rows, as the model around it expects.
Rows part where their own adapter begins; those of one adapter and one text never do.

On a CPU rows go through a block in portions, since a product is slow whose inputs have left the cache.

Nothing is shared where values alone do not say what is equal: with gradients or dropout, with a cache of keys, with
arguments that differ among equal rows, and from the block on that is given something else than the last one returned.

Dimensions: B rows of a batch, U groups of equal ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors import TensorVersion
from .gathered import BlockPlace, GatheredRows

PORTION = 3 * 2**17
"""Values of inputs that go through a block together on a CPU (measured; a row is never divided)."""


class Arguments(NamedTuple):
    """Of a call of a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def first(self) -> Any:
        """The block's inputs."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


class Groups:
    """Rows of a batch that are equal.

    Args:
        keys: one a row; equal ones have equal keys.
        device: of the rows.
    """

    def __init__(self, keys: Sequence[Hashable], device: torch.device) -> None:
        numbers: dict[Hashable, int] = {}
        self.of = [numbers.setdefault(key, len(numbers)) for key in keys]
        """The group of each row."""
        self.first = [*map(self.of.index, range(len(numbers)))]
        """The row that stands for each group."""
        self._of, self._first = torch.tensor(self.of, device=device), torch.tensor(self.first, device=device)

    def __len__(self) -> int:
        return len(self.first)

    def narrowed(self, tensor: Tensor) -> Tensor:
        """One row of each group: (B, ...) to (U, ...)."""
        return tensor if len(self.first) == len(self.of) else tensor.index_select(0, self._first)

    def repeated(self, tensor: Tensor) -> Tensor:
        """All rows: (U, ...) to (B, ...)."""
        return tensor if len(self.first) == len(self.of) else tensor.index_select(0, self._of)

    def are_equal_in(self, tensor: Tensor) -> bool:
        """Whether the rows of each group are equal in a tensor of B rows."""
        # Dimensions along which values are only repeated, as in masks, are looked at once.
        once = tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
        pairs = [(row, self.first[group]) for row, group in enumerate(self.of) if row != self.first[group]]
        return len(once) < len(tensor) or all(torch.equal(once[row], once[first]) for row, first in pairs)


def equal_rows(x: Tensor) -> list[int] | None:
    """For each row the first one that has the same values, of the same sum; None if all differ."""
    first: dict[float, int] = {}
    found = [
        first.setdefault(total, row) for row, total in enumerate(x.flatten(1).sum(1, dtype=torch.float32).tolist())
    ]
    if len(first) == len(found):
        return None
    return [like if like == row or torch.equal(x[row], x[like]) else row for row, like in enumerate(found)]


class _UnsharedError(Exception):
    """A value does not say which of it is of which row, or equal rows differ in it."""


class SharedPass:
    """One pass of a batch through a list of blocks.

    Args:
        rows: the adapters of the batch.
        x: inputs of the first block, (B, ...).
        texts: for each row the first one that has the same inputs.
    """

    def __init__(self, rows: GatheredRows, x: Tensor, texts: Sequence[int]) -> None:
        self._all_rows, self._texts, self._device = rows, texts, x.device
        self._acting: list[int] | None = None
        """The adapter of each row in the last block, by which the groups are."""
        self._groups = Groups(range(len(x)), self._device)
        self._portions: list[tuple[slice, GatheredRows]] = []
        """Of the groups, with their adapters."""
        self._given = self._narrow = x
        """What the model has from the last block, and the same with one row of each group."""
        self._version: TensorVersion | None = None
        self._same: dict[int, tuple[Tensor, Tensor]] = {}
        """Arguments that all blocks get, by their identity, with one row of each group."""

    @classmethod
    def begun(cls, rows: GatheredRows, given: Arguments) -> SharedPass | None:
        """A pass that begins with these arguments, if rows are equal."""
        x, index = given.first, rows.rows
        if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != len(index.places) or index.repeats > 1:
            return None
        try:
            _mapped(lambda tensor: tensor, tuple(given))
        except _UnsharedError:
            return None
        texts = equal_rows(x)
        if texts is None and x.numel() <= PORTION:
            return None
        return cls(rows, x, texts or range(len(x)))

    def enter(self, place: BlockPlace, given: Arguments) -> list[tuple[GatheredRows, Arguments]] | None:
        """The arguments of a block with one row of each group, and their adapters, in portions.

        None: from here on nothing is shared.
        """
        if given.first is not self._given or not (self._version is None or self._version.is_of(self._given)):
            return None
        if (acting := self._all_rows.acting(place)) != self._acting:
            groups = Groups([*zip(self._texts, acting, strict=True)], self._device)
            # Repeating rows costs about an eighth of a block.
            if 8 * len(groups) > 7 * len(self._texts):
                groups = Groups(range(len(self._texts)), self._device)
            size = len(groups)
            if self._device.type == "cpu":
                size = max(1, round(PORTION * len(self._narrow) / self._narrow.numel()))
            if len(groups) == len(self._texts) <= size:
                return None
            before = [self._groups.of[row] for row in groups.first]
            self._narrow = self._narrow.index_select(0, torch.tensor(before, device=self._device))
            self._acting, self._groups, self._same = acting, groups, {}
            self._portions = [
                (slice(start, start + size), self._all_rows.of_rows(groups.first[start : start + size]))
                for start in range(0, len(groups), size)
            ]
        try:
            return [
                (rows, Arguments(*_mapped(partial(self._narrowed, part), tuple(given))))
                for part, rows in self._portions
            ]
        except _UnsharedError:
            return None

    def leave(self, portions: Sequence[Any]) -> Any:
        """The outputs of a block for all rows; None where they do not say which of them are of which row.

        Args:
            portions: of its outputs.
        """
        try:
            # No inference tensor: those do not count writes, and what is written to is no longer a repetition.
            with torch.inference_mode(False):
                outputs = portions[0] if len(portions) == 1 else _mapped(self._joined, *portions)
                repeated = _mapped(self._repeated, outputs)
        except _UnsharedError:
            return None
        self._narrow, self._given = _first(outputs), _first(repeated)
        self._version = TensorVersion.of(self._given)
        return repeated

    def _narrowed(self, part: slice, tensor: Tensor) -> Tensor:
        if tensor is self._given:
            return self._narrow[part]
        if tensor.dim() == 0 or len(tensor) != len(self._texts):
            return tensor
        if id(tensor) not in self._same:
            if not self._groups.are_equal_in(tensor):
                raise _UnsharedError
            self._same[id(tensor)] = tensor, self._groups.narrowed(tensor)
        return self._same[id(tensor)][1][part]

    def _joined(self, *portions: Tensor) -> Tensor:
        first, (part, _) = portions[0], self._portions[0]
        return torch.cat(portions) if first.dim() and len(first) == part.stop else first

    def _repeated(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) not in (1, len(self._groups)):
            raise _UnsharedError
        return self._groups.repeated(tensor) if len(tensor) == len(self._groups) else tensor


def _mapped(function: Callable[..., Tensor], *values: Any) -> Any:
    """Arguments or outputs of one form, with a tensor for those in the same place."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if type(first) in (tuple, list):
        return type(first)(_mapped(function, *parts) for parts in zip(*values, strict=True))
    if isinstance(first, dict):
        return type(first)(**{key: _mapped(function, *map(itemgetter(key), values)) for key in first})
    if first is None or isinstance(first, bool | int | float | str | torch.dtype):
        return first
    raise _UnsharedError


def _first(outputs: Any) -> Any:
    """What a block hands to the next one."""
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs
