"""What rows of a batch have in common is computed once, in blocks that are known to compute each row alone.

Models run through lists of blocks. Rows that come to the first block with the same values stay the same for as long as
their adapters change nothing: sixteen classifiers of one text need the blocks below their adapters once. So a block
gets one row for each group of equal ones, and its outputs are repeated for all rows, as the model around it expects.
Rows part where their own adapter begins; those of one adapter and one text never do.

On a CPU rows go through a block in portions, since a product is slow whose inputs have left the cache.

Every row is computed in blocks that are not known (`dvora.blocks`), with gradients or dropout, where somebody has hooks
in blocks, as for attentions that are asked for, with a cache of keys, and with arguments that differ among equal rows.

Dimensions: B rows of a batch, U groups of equal ones, T tokens, H features.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..blocks import BY_ROW
from ..tensors import Float, TensorVersion
from .gathered import GatheredRows

PORTION = 3 * 2**17
"""Values of inputs that go through a block together on a CPU (measured; a row is never divided)."""


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

    def narrowed(self, tensor: Float[Tensor, "B ..."]) -> Float[Tensor, "U ..."]:
        """One row of each group."""
        return tensor if len(self.first) == len(self.of) else tensor.index_select(0, self._first)

    def repeated(self, tensor: Float[Tensor, "U ..."]) -> Float[Tensor, "B ..."]:
        """All rows."""
        return tensor if len(self.first) == len(self.of) else tensor.index_select(0, self._of)

    def are_equal_in(self, tensor: Float[Tensor, "B ..."]) -> bool:
        """Whether the rows of each group are equal."""
        # Dimensions along which values are only repeated, as in masks, are looked at once.
        once = tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]
        pairs = [(row, self.first[group]) for row, group in enumerate(self.of) if row != self.first[group]]
        return len(once) < len(tensor) or all(torch.equal(once[row], once[first]) for row, first in pairs)


def equal_rows(x: Float[Tensor, "B ..."]) -> list[int] | None:
    """For each row the first one that has the same values, of the same sum; None if all differ."""
    first: dict[float, int] = {}
    found = [
        first.setdefault(total, row) for row, total in enumerate(x.flatten(1).sum(1, dtype=torch.float32).tolist())
    ]
    if len(first) == len(found):
        return None
    return [like if like == row or torch.equal(x[row], x[like]) else row for row, like in enumerate(found)]


class KnownBlocks:
    """A list of known blocks, with the hooks that they have now.

    Args:
        blocks: one of `known_lists`.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.blocks = [*blocks]
        self._names = [*signature(type(blocks[0]).forward).parameters][1:]
        own = {id(block) for block in blocks}
        self._modules = [(module, _hooks(module), id(module) in own) for module in blocks.modules()]

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name, the hidden states first."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def run_as_known(self) -> bool:
        """Whether all are in evaluation mode, and nobody has put a hook or another forward in them since."""
        if _has_any_global_hook():
            return False
        for module, hooks, is_block in self._modules:
            if module.training or _hooks(module) != hooks or ("forward" in vars(module) and not is_block):
                return False
        return True


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


class SharedPass:
    """One pass of a batch through a list of known blocks.

    Args:
        rows: the adapters of the batch.
        blocks: the number of the list.
        x: inputs of the first block.
        texts: for each row the first one that has the same inputs.
    """

    def __init__(self, rows: GatheredRows, blocks: int, x: Float[Tensor, "B T H"], texts: Sequence[int]) -> None:
        self._all_rows, self._blocks, self._texts, self._device = rows, blocks, texts, x.device
        self._next = 0
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
    def begun(cls, rows: GatheredRows, blocks: int, x: Float[Tensor, "B T H"]) -> SharedPass | None:
        """A pass that begins with these inputs, if rows are equal or go in portions."""
        index = rows.rows
        if x.dim() != 3 or len(x) != len(index.places) or index.repeats > 1:
            return None
        texts = equal_rows(x)
        if texts is None and x.numel() <= PORTION:
            return None
        return cls(rows, blocks, x, texts or range(len(x)))

    def enter(self, block: int, arguments: Mapping[str, Any]) -> list[tuple[GatheredRows, dict[str, Any]]] | None:
        """The arguments of a block with one row of each group, and their adapters, in portions.

        None: from here on every row is computed.
        """
        (x_name, x), *others = arguments.items()
        is_next = block == self._next and x is self._given
        if not is_next or not (self._version is None or self._version.is_of(x)):
            return None
        self._next += 1
        if (acting := self._all_rows.acting(self._blocks, block)) != self._acting and not self._regroup(acting):
            return None
        of_rows = {name: value for name, value in others if value is not None and value is not False}
        tensors = [t for value in of_rows.values() for t in (value if isinstance(value, tuple) else (value,))]
        if of_rows.keys() - BY_ROW or not all(map(self._has_rows, tensors)):
            return None
        portions = []
        for part, rows in self._portions:
            narrowed = {name: self._part(value, part) for name, value in of_rows.items()}
            portions.append((rows, {**arguments, x_name: self._narrow[part], **narrowed}))
        return portions

    def leave(self, outputs: Sequence[Any]) -> Any:
        """The outputs of a block for all rows.

        Args:
            outputs: those of the portions: hidden states, alone or in a tuple.
        """
        states = [output[0] if isinstance(output, tuple) else output for output in outputs]
        # No inference tensor: those do not count writes, and what is written to is no longer a repetition.
        with torch.inference_mode(False):
            self._narrow = torch.cat(states)
            self._given = self._groups.repeated(self._narrow)
        self._version = TensorVersion.of(self._given)
        return (self._given,) if isinstance(outputs[0], tuple) else self._given

    def _regroup(self, acting: list[int]) -> bool:
        """Make the groups of a block in which these adapters act; False where nothing is gained by any."""
        groups = Groups([*zip(self._texts, acting, strict=True)], self._device)
        # Repeating rows costs about an eighth of a block.
        if 8 * len(groups) > 7 * len(self._texts):
            groups = Groups(range(len(self._texts)), self._device)
        size = len(groups)
        if self._device.type == "cpu":
            size = max(1, round(PORTION * len(self._narrow) / self._narrow.numel()))
        if len(groups) == len(self._texts) <= size:
            return False
        before = [self._groups.of[row] for row in groups.first]
        self._narrow = self._narrow.index_select(0, torch.tensor(before, device=self._device))
        self._acting, self._groups, self._same = acting, groups, {}
        self._portions = [
            (slice(start, start + size), self._all_rows.of_rows(groups.first[start : start + size]))
            for start in range(0, len(groups), size)
        ]
        return True

    def _has_rows(self, tensor: Any) -> bool:
        """Whether a part of an argument has one entry, or one a row, equal ones in a group."""
        if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) not in (1, len(self._texts)):
            return False
        if len(tensor) > 1 and id(tensor) not in self._same:
            if not self._groups.are_equal_in(tensor):
                return False
            self._same[id(tensor)] = tensor, self._groups.narrowed(tensor)
        return True

    def _part(self, value: Any, part: slice) -> Any:
        """An argument for a portion of the groups."""
        if isinstance(value, tuple):
            return tuple(self._part(each, part) for each in value)
        return self._same[id(value)][1][part] if len(value) > 1 else value
