"""The adapters of a batch by its rows: factors of layers, and heads.

Dimensions: B rows of a batch, S places of adapters, F values of a factor row, R rank, I in, O out.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from ..adapter_file.content import SavedWhole
from ..factors import Factors
from ..tensors import saved_tensors_are_hooked
from .low_rank import LowRank


class LayerPlace(NamedTuple):
    """Where a layer stands in a factor row."""

    start: int
    out_features: int
    lambda_d_size: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of `g - 1`, scale and lambda_d."""
        return self.out_features, self.out_features, self.lambda_d_size

    @property
    def stop(self) -> int:
        """The first value behind it."""
        return self.start + sum(self.lengths)


class Held(NamedTuple):
    """What an adapter has besides its factor row."""

    heads: Mapping[str, Tensor]
    """Parts of heads by their full names."""
    first_blocks: Sequence[int] | None = None
    """Of each list of known blocks the first that it changes, or how many there are; None: perhaps the first."""
    changed: Collection[int] | None = None
    """The layers that its vectors change, by their positions; None: perhaps all."""
    factors: Mapping[str, LowRank] = {}
    """Of LoRA by layer, each without the dimension of rows."""


class ServedHead(NamedTuple):
    """One module that every adapter has as a whole, such as a classifier."""

    name: str
    module: nn.Module
    skeleton: nn.Module
    """A copy without hooks, which never runs itself."""
    parts: tuple[SavedWhole, ...]
    """Its parameters and buffers that adapters save, by their full names."""


class HeadGroup(NamedTuple):
    """Rows of a batch whose heads have the same shapes."""

    rows: Tensor | None
    """None: all."""
    parameters: dict[str, Tensor]
    """By their names in the head, each with one entry a row."""


class HeadByRow(threading.local):
    """A head that takes the parameters of each row; a copy for each thread, into which `functional_call` puts them."""

    def __init__(self, head: ServedHead) -> None:
        self.module = copy.deepcopy(head.skeleton)

    def outputs(self, parameters: dict[str, Tensor], args: Sequence[Tensor]) -> Tensor:
        """The outputs of every row by its own parameters, as if it was alone.

        Args:
            parameters: by their names in the head, each with one entry a row.
            args: of the head, for all rows.
        """
        outputs: Tensor = torch.vmap(self._alone, randomness="different")(parameters, *args)
        return outputs

    def _alone(self, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(self.module, parameters, tuple([x.unsqueeze(0) for x in inputs]))
        return output.squeeze(0)


def saved_here() -> AbstractContextManager[object]:
    """Within it, keep what is saved for a backward pass from the hooks around it.

    A checkpoint counts what is saved in both runs of its part, of which one makes the factors and the other finds them.
    """
    return saved_tensors_hooks(Tensor.detach, _itself) if saved_tensors_are_hooked() else nullcontext()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class RowIndex:
    """The place of each row's adapter in a matrix of all, also where generation repeats rows.

    Args:
        places: one a row.
        repeats: how often generation repeats each row, one after another.
        device: of the matrix.
    """

    def __init__(self, places: Sequence[int], repeats: int, device: torch.device) -> None:
        self.places, self.repeats = list(places), repeats
        self.once = torch.tensor(self.places, device=device)
        self.repeated = self.once.repeat_interleave(repeats) if repeats > 1 else self.once

    def of(self, rows: int) -> Tensor:
        """The index for a batch as a layer has it: an encoder's rows are not repeated.

        Raises:
            ValueError: there is not one name a row.
        """
        if rows == len(self.repeated):
            return self.repeated
        if rows == len(self.once):
            return self.once
        given = f"{len(self.once)} names" + (f", each repeated {self.repeats} times" if self.repeats > 1 else "")
        raise ValueError(
            f"bank.rows got {given}, and the layer a batch of {rows} rows; give one name a row, with repeats=num_beams "
            "(or num_return_sequences) where generation repeats rows. A layer that gets tokens without their rows (an "
            "expert's) cannot have an adapter for each row"
        )

    def places_of(self, rows: int) -> list[int]:
        """The places for a batch as a layer has it; errors as of `of`."""
        index = self.of(rows)
        return self.places if index is self.once else index.tolist()


class RowsFirst:
    """Whether the first dimension of a layer's inputs is known to be that of the rows: a batch has shown it.

    PyTorch's own transformers have tokens there by default. Of as many rows as tokens each would get another's adapter,
    where any other batch is refused.

    Args:
        name: of the layer.
        is_known: from elsewhere.
    """

    def __init__(self, name: str, is_known: bool = False) -> None:
        self.name, self.is_known = name, is_known

    def look(self, x: Tensor, rows: RowIndex) -> None:
        """See whether these inputs show it: they have tokens, of another number than the batch has rows."""
        tokens = _tokens(x)
        self.is_known = bool(tokens) and len(x) in (len(rows.once), len(rows.repeated)) and len(x) not in tokens

    def check(self, x: Tensor) -> None:
        """Refuse inputs with as many rows as tokens, where that is all that is known.

        Raises:
            ValueError: they are.
        """
        if not self.is_known and len(x) > 1 and len(x) in _tokens(x):
            raise ValueError(
                f"{self.name} got inputs of shape {tuple(x.shape)}, and no batch has shown yet which dimension has the "
                "rows; call the model with another number of rows first, one row for example"
            )


def _tokens(x: Tensor) -> tuple[int, ...]:
    """The sizes of the dimensions between that of rows and that of features, which ids lack."""
    return x.shape[1:-1] if x.is_floating_point() else x.shape[1:]


def check_names(names: Sequence[object], repeats: int, kinds: tuple[type, ...] = (str,)) -> None:
    """Refuse what cannot name the rows of a batch.

    Raises:
        TypeError, ValueError: it is no list of names, or a number is out of range.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list with one name a row, got {names!r}")
    if wrong := [name for name in names if not (name is None or isinstance(name, kinds))]:
        raise TypeError(f"names must be strings, or None for the base, got {wrong[0]!r}")
    if not names:
        raise ValueError("names is empty; give one name a row of the batch")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be a positive integer, got {repeats!r}")


class GatheredRows:
    """The adapters of a batch: factors in one matrix, gathered by its rows once for all layers, and heads.

    Args:
        rows: the place of each row's adapter.
        lengths: of `g - 1`, scale and lambda_d of every layer.
        factors: gives the factor rows of all, (S, F); gathered anew when that is another tensor.
        held: gives what each of them has besides.
        base: the place of the base, or None where no row can be its.
        dropout: of the inputs of updates.
    """

    def __init__(
        self,
        rows: RowIndex,
        lengths: Sequence[int],
        factors: Callable[[], Tensor],
        held: Callable[[], Sequence[Held]],
        base: int | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        self.rows, self.dropout = rows, dropout
        self._lengths, self._matrix, self._held, self._base = lengths, factors, held, base
        self._of: Tensor | None = None
        self._gathered: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, int], list[Factors]] = {}
        self._low_rank: dict[tuple[str, int], list[tuple[Tensor | None, LowRank]]] = {}

    def factors(self, layer: int, rows: int, dimensions: int, dtype: torch.dtype) -> Factors:
        """The factors of a layer: a part of what is gathered and split once.

        Args:
            layer: its position.
            rows, dimensions: of its outputs.
            dtype: of the factors.
        """
        matrix = self._matrix()
        if matrix is not self._of:
            self._of, self._gathered, self._factors = matrix, {}, {}
        if (rows, dimensions) not in self._factors:
            # Slots have no gradient, and inference tensors could not be used in a later pass with gradients.
            with nullcontext() if matrix.requires_grad else torch.inference_mode(False), saved_here():
                if rows not in self._gathered:
                    self._gathered[rows] = matrix.index_select(0, self.rows.of(rows)).to(dtype)
                values = self._gathered[rows].view(rows, *(1,) * (dimensions - 2), -1)
                parts = iter(values.split(self._lengths, -1))
                self._factors[rows, dimensions] = [Factors(*three) for three in zip(parts, parts, parts, strict=True)]
        return self._factors[rows, dimensions][layer]

    def low_rank(self, layer: str, rows: int) -> list[tuple[Tensor | None, LowRank]]:
        """Rows (None: all) with factors of LoRA in a layer, and these: those of the same shapes together.

        One adapter for all rows of a group has factors of N = 1.

        Args:
            layer: its name.
            rows: of its outputs.
        """
        if layer not in self._layers_with_factors:
            # Layers that nobody adapts may get something else than rows.
            return []
        if (layer, rows) not in self._low_rank:
            held, places = self._held(), self.rows.places_of(rows)
            of_shapes: dict[tuple[torch.Size, torch.Size], list[int]] = {}
            for row, place in enumerate(places):
                if (of_row := held[place].factors.get(layer)) is not None:
                    of_shapes.setdefault((of_row.A.shape, of_row.B.shape), []).append(row)
            groups: list[tuple[Tensor | None, LowRank]] = []
            # Inference tensors could not be used in a later pass with gradients.
            with torch.inference_mode(False):
                for members in of_shapes.values():
                    is_one = len({places[row] for row in members}) == 1
                    factors = [held[places[row]].factors[layer] for row in members[: 1 if is_one else None]]
                    who = None if len(members) == rows else torch.tensor(members, device=self.rows.once.device)
                    groups.append((who, LowRank(*map(torch.stack, zip(*factors, strict=True)))))
            self._low_rank[layer, rows] = groups
        return self._low_rank[layer, rows]

    @cached_property
    def _layers_with_factors(self) -> set[str]:
        held = self._held()
        return {layer for place in {*self.rows.places} for layer in held[place].factors}

    def acting(self, blocks: int, block: int) -> list[int]:
        """The adapter of each row by its place; -1 where it has changed nothing by the end of a block of a list."""
        held = self._held()
        first = [held[at].first_blocks for at in self.rows.places]
        return [at if of is None or of[blocks] <= block else -1 for at, of in zip(self.rows.places, first, strict=True)]

    def changes(self, layer: int) -> bool:
        """Whether vectors of an adapter of the batch change a layer."""
        return self._changed is None or layer in self._changed

    def with_vectors(self, rows: int) -> tuple[Tensor, GatheredRows] | None:
        """The rows that vectors of an adapter change, and their adapters; None where most of them are.

        Args:
            rows: of a layer's outputs.
        """
        if rows != len(self.rows.once) or torch.is_grad_enabled():
            return None
        return self._with_vectors

    @cached_property
    def _with_vectors(self) -> tuple[Tensor, GatheredRows] | None:
        held, places = self._held(), self.rows.places
        changed = [row for row, place in enumerate(places) if place != self._base and not held[place].factors]
        if 2 * len(changed) > len(places):
            return None
        return torch.tensor(changed, dtype=torch.int64, device=self.rows.once.device), self.of_rows(changed)

    @cached_property
    def _changed(self) -> Collection[int] | None:
        held = self._held()
        changed = [held[place].changed for place in {*self.rows.places}]
        return None if None in changed else {layer for of in changed for layer in of or ()}

    def of_rows(self, rows: Sequence[int]) -> GatheredRows:
        """The adapters of some of the rows, which are not repeated."""
        index = RowIndex([self.rows.places[row] for row in rows], 1, self.rows.once.device)
        return GatheredRows(index, self._lengths, self._matrix, self._held, self._base, self.dropout)

    def heads(self, head: ServedHead, rows: int) -> list[HeadGroup]:
        """The parameters of a head, by groups of rows with heads of the same shapes."""
        held = self._held()
        heads = [held[place].heads for place in self.rows.places_of(rows)]
        of_shapes: dict[tuple[torch.Size, ...], list[int]] = {}
        for row, parts in enumerate(heads):
            of_shapes.setdefault(tuple(parts[part.name].shape for part in head.parts), []).append(row)
        groups = []
        for members in of_shapes.values():
            parameters = {
                part.name.removeprefix(f"{head.name}."): torch.stack([heads[row][part.name] for row in members])
                for part in head.parts
            }
            who = None if len(of_shapes) == 1 else torch.tensor(members, device=self.rows.once.device)
            groups.append(HeadGroup(who, parameters))
        return groups

    def of_base(self, rows: int) -> Tensor | None:
        """Which rows are the base's; None where none can be."""
        return None if self._base is None else self.rows.of(rows) == self._base
