"""Where the rows of adapters are: in memory up to a number of bytes, and in slots on the device, for those of a batch.

In both, what was used least recently goes first; from the slots none that a running batch has.

Dimensions: S slots, B rows of a batch, F values of a factor row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..rows.gathered import GatheredRows, Held, LayerPlace, RowIndex
from ..rows.low_rank import LowRank
from ..tensors import Float


class AdapterRow(NamedTuple):
    """One adapter as a bank holds it."""

    factors: Float[Tensor, "F"]
    held: Held
    """Heads, and factors of LoRA."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.factors.nbytes + sum(tensor.nbytes for tensor in _tensors_of(self.held))


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
        self.held = [Held({})] * (count + 1)
        """What the adapter in each slot has besides: heads of any number of outputs, factors of any rank."""
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
        return GatheredRows(index, self._lengths, lambda: self.factors, lambda: self.held, base=self.count)

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

    def waiting(self) -> int:
        """How many batches wait for slots now."""
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.factors.nbytes + sum(part.nbytes for held in self.held for part in _tensors_of(held))

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
            device, held = self.factors.device, row.held
            self.held[slot] = held._replace(
                heads={name: values.to(device) for name, values in held.heads.items()},
                factors={name: LowRank(*(factor.to(device) for factor in of)) for name, of in held.factors.items()},
            )


def _tensors_of(held: Held) -> Iterator[Tensor]:
    yield from held.heads.values()
    yield from chain.from_iterable(held.factors.values())
