"""Where the rows of adapters are: in memory up to a number of bytes, and in slots on the device, for those of a batch.

In both, what was used least recently goes first; from the slots none that a running batch has.

Dimensions: S slots, B rows of a batch, F values of a factor row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..adapter_file.content import SavedWhole
from ..factors import Factors
from ..tensors import Float, saved_tensors_are_hooked


class AdapterRow(NamedTuple):
    """One adapter as a bank holds it."""

    factors: Float[Tensor, "F"]
    heads: Mapping[str, Tensor]
    """Parameters and buffers of heads, by their full names."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.factors.nbytes + sum(tensor.nbytes for tensor in self.heads.values())


class LayerPlace(NamedTuple):
    """Where a layer stands in a factor row."""

    start: int
    out_features: int
    rank: int

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of `g - 1`, scale and lambda_d."""
        return self.out_features, self.out_features, self.rank

    @property
    def stop(self) -> int:
        """The first value behind it."""
        return self.start + sum(self.lengths)


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


class HostRows:
    """Rows on the CPU by digest, safe under threads.

    Args:
        limit: bytes; one row that is larger is kept alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.nbytes = limit, 0
        self._lock = threading.Lock()
        self._rows: OrderedDict[str, AdapterRow] = OrderedDict()

    def get(self, digest: str | None) -> AdapterRow | None:
        """The row of an adapter, if it is here; it is then the most recently used."""
        with self._lock:
            if digest is None or digest not in self._rows:
                return None
            self._rows.move_to_end(digest)
            return self._rows[digest]

    def put(self, digest: str, row: AdapterRow) -> None:
        """Keep the row of an adapter, in the place of others."""
        self.remove(digest)
        with self._lock:
            while self._rows and self.nbytes + row.nbytes > self.limit:
                self.nbytes -= self._rows.popitem(last=False)[1].nbytes
            self._rows[digest] = row
            self.nbytes += row.nbytes

    def remove(self, digest: str) -> None:
        """Forget an adapter, if it is here."""
        with self._lock:
            if digest in self._rows:
                self.nbytes -= self._rows.pop(digest).nbytes

    def __len__(self) -> int:
        return len(self._rows)


class Slots:
    """A fixed number of slots, and one more behind them for the base.

    A batch takes all its slots at once or waits, so that no two batches wait for each other. Those that wait go in the
    order in which they came, so that small ones do not keep a large one out for ever.

    Args:
        count: S.
        base: the row of the base.
        places: of the layers in a factor row.
        device: of the slots.
    """

    def __init__(self, count: int, base: AdapterRow, places: Sequence[LayerPlace], device: torch.device) -> None:
        self.count = count
        self._lengths = [length for place in places for length in place.lengths]
        # Not within inference mode, whose tensors no later pass may write to.
        with torch.inference_mode(False):
            self.factors = base.factors.new_zeros(count + 1, len(base.factors), device=device)
        self.heads: list[Mapping[str, Tensor]] = [{}] * (count + 1)
        """Parts of the head in each slot, by their full names: of any number of outputs."""
        self._changed = threading.Condition()
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        """By digest; the least recently used first."""
        self._unused = list(reversed(range(count)))
        self._held: dict[object, tuple[int, Collection[str]]] = {}
        """The thread of each running batch, and what it holds."""
        self._waiting: deque[object] = deque()
        self._left: dict[str, torch.cuda.Event] = {}
        """On CUDA: when the last batch that used a slot is through."""
        self.hits = self.loads = self.evictions = 0
        self._put(count, base)

    def take(
        self, batch: object, digests: Collection[str], load: Callable[[Sequence[str]], Mapping[str, AdapterRow]]
    ) -> dict[str, int]:
        """Slots for a batch until `release`; waits while other batches hold too many.

        Args:
            batch: compared by identity.
            digests: of its adapters.
            load: gives the rows of those that have no slot.

        Returns:
            The slot of each.

        Raises:
            ValueError: there are too few slots, or this thread is in a batch already and there is no room for another.
        """
        if len(digests) > self.count:
            raise ValueError(
                f"names: a batch has {len(digests)} different adapters, and the bank {self.count} slots; make smaller "
                "batches, or a bank with more slots"
            )
        # Outside of the lock, since other batches go on meanwhile.
        rows = load([digest for digest in digests if digest not in self._slot_of])
        with self._changed:
            self._waiting.append(batch)
            try:
                self._changed.wait_for(lambda: not digests or self._is_next(batch, digests))
                missing = [digest for digest in digests if digest not in self._slot_of]
                # Those that were evicted while the batch waited were not asked for.
                rows = {**rows, **load([digest for digest in missing if digest not in rows])}
                self._held[batch] = threading.get_ident(), digests
                for digest in missing:
                    self._assign(digest, rows[digest])
            except BaseException:
                self._held.pop(batch, None)
                raise
            finally:
                self._waiting.remove(batch)
                self._changed.notify_all()
            for digest in digests:
                self._slot_of.move_to_end(digest)
            self.loads += len(missing)
            self.hits += len(digests) - len(missing)
            return {digest: self._slot_of[digest] for digest in digests}

    def rows(self, index: RowIndex) -> GatheredRows:
        """The rows of a batch."""
        return GatheredRows(index, self._lengths, lambda: self.factors, lambda: self.heads, base=self.count)

    def release(self, batch: object) -> None:
        """Give the slots of a batch back, if it has any; its adapters stay in them until others need the room."""
        with self._changed:
            for digest in self._held.pop(batch, (0, ()))[1]:
                if self.factors.is_cuda:
                    self._left[digest] = torch.cuda.Event()
                    self._left[digest].record()
            self._changed.notify_all()

    def used(self) -> int:
        """How many slots hold an adapter."""
        return len(self._slot_of)

    def in_use(self) -> int:
        """How many slots batches hold now."""
        with self._changed:
            return len(self._in_use())

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.factors.nbytes + sum(part.nbytes for head in self.heads for part in head.values())

    def __contains__(self, digest: object) -> bool:
        return digest in self._slot_of

    def _in_use(self, thread: int | None = None) -> set[str]:
        """What batches hold: all, or those of a thread."""
        held = (digests for holder, digests in self._held.values() if thread in (None, holder))
        return set(chain.from_iterable(held))

    def _is_next(self, batch: object, digests: Collection[str]) -> bool:
        """Whether a batch that waits may take its slots. In a thread that holds some already none waits."""
        fit = len(self._in_use().union(digests)) <= self.count
        if not (held := self._in_use(threading.get_ident())):
            return fit and self._waiting[0] is batch
        if not fit:
            raise ValueError(
                f"names: batches that this thread is in hold {len(held)} of the {self.count} slots, and there is no "
                "room for another one, which might wait for ever; leave them first, or make a bank with more slots"
            )
        return True

    def _assign(self, digest: str, row: AdapterRow) -> None:
        if not self._unused:
            self._evict()
        # Unused until it is whole: what fails loses no slot.
        self._put(self._unused[-1], row)
        self._slot_of[digest] = self._unused.pop()

    def _evict(self) -> None:
        """The adapter that was used least recently leaves its slot; never one that a running batch has."""
        in_use = self._in_use()
        oldest = next(other for other in self._slot_of if other not in in_use)
        self._unused.append(self._slot_of.pop(oldest))
        self.evictions += 1
        if (left := self._left.pop(oldest, None)) is not None:
            left.wait()

    @torch.no_grad()
    def _put(self, slot: int, row: AdapterRow) -> None:
        with torch.inference_mode(False):
            self.factors[slot].copy_(row.factors)
            self.heads[slot] = {name: values.to(self.factors.device) for name, values in row.heads.items()}


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


class GatheredRows:
    """The adapters of a batch: factors in one matrix, gathered by its rows once for all layers, and heads.

    Args:
        rows: the place of each row's adapter.
        lengths: of `g - 1`, scale and lambda_d of every layer.
        factors: gives the factor rows of all, (S, F); gathered anew when that is another tensor.
        heads: gives the parts of the heads of all, by place and name.
        base: the place of the base, or None where no row can be its.
        dropout: of the inputs of updates.
    """

    def __init__(
        self,
        rows: RowIndex,
        lengths: Sequence[int],
        factors: Callable[[], Tensor],
        heads: Callable[[], Sequence[Mapping[str, Tensor]]],
        base: int | None = None,
        dropout: nn.Module | None = None,
    ) -> None:
        self.rows, self.dropout = rows, dropout
        self._lengths, self._matrix, self._heads, self._base = lengths, factors, heads, base
        self._of: Tensor | None = None
        self._gathered: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, int], list[Factors]] = {}

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

    def heads(self, head: ServedHead, rows: int) -> list[HeadGroup]:
        """The parameters of a head, by groups of rows with heads of the same shapes."""
        heads, index = self._heads(), self.rows.of(rows)
        places = self.rows.places if index is self.rows.once else index.tolist()
        of_shapes: dict[tuple[torch.Size, ...], list[int]] = {}
        for row, place in enumerate(places):
            of_shapes.setdefault(tuple(heads[place][part.name].shape for part in head.parts), []).append(row)
        groups = []
        for members in of_shapes.values():
            parameters = {
                part.name.removeprefix(f"{head.name}."): torch.stack([heads[places[row]][part.name] for row in members])
                for part in head.parts
            }
            who = None if len(of_shapes) == 1 else torch.tensor(members, device=index.device)
            groups.append(HeadGroup(who, parameters))
        return groups

    def of_base(self, rows: int) -> Tensor | None:
        """Which rows are the base's; None where none can be."""
        return None if self._base is None else self.rows.of(rows) == self._base
