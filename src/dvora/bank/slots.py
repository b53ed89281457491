"""The slots of a bank on the device: which adapter is in which, least recently used out first, none that is in use.

Dimensions: S slots, F values of a factor row, H of a head row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from .factors import Factors


class Slots:
    """A fixed number of slots, and one more behind them for the base.

    A batch takes all its slots at once or waits, so that no two batches wait for each other. Those that wait go in the
    order in which they came, so that small ones do not keep a large one out for ever.

    Args:
        count: S.
        base: the rows of the base.
        device: of the slots.
    """

    def __init__(self, count: int, base: Factors, device: torch.device) -> None:
        self.count = count
        # Not within inference mode, whose tensors no later pass may write to.
        with torch.inference_mode(False):
            self.values = base.row.new_zeros(count + 1, len(base.row), device=device)
            self.heads = base.heads.new_zeros(count + 1, len(base.heads), device=device)
        self._put(count, base)
        self._freed = threading.Condition()
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        """By digest; the least recently used first."""
        self._unused = list(reversed(range(count)))
        self._batches: dict[object, Collection[str]] = {}
        """What each batch that runs holds."""
        self._waiting: deque[object] = deque()
        """Batches that have no slots yet; the first in turn first."""
        self._closed = False
        self._pinned: set[str] = set()
        self._left: dict[str, torch.cuda.Event] = {}
        """On CUDA: when the last batch that used a slot is through."""
        self.hits = self.loads = self.evictions = 0

    def take(self, batch: object, digests: Collection[str], load: Callable[[str], Factors]) -> dict[str, int]:
        """Slots for a batch until it leaves; waits while other batches hold too many.

        Args:
            batch: compared by identity.
            digests: of its adapters.
            load: gives the rows of one that has no slot.

        Returns:
            The slot of each.

        Raises:
            ValueError: the slots that are not pinned for others are too few, now or after a while.
        """
        self._check_count(digests)
        rows = self._loaded(digests, load)
        with self._freed:
            self._waiting.append(batch)
            self._freed.wait_for(lambda: not digests or (self._waiting[0] is batch and self._has_room(digests)))
            self._batches[batch] = digests
            missing = [digest for digest in digests if digest not in self._slot_of]
            for digest in missing:
                # Evicted while the batch waited: its rows were not asked for.
                self._assign(digest, rows.get(digest) or load(digest))
            for digest in digests:
                self._slot_of.move_to_end(digest)
            self.loads += len(missing)
            self.hits += len(digests) - len(missing)
            self._go_on(batch)
            return {digest: self._slot_of[digest] for digest in digests}

    def leave(self, batch: object) -> None:
        """Give the slots of a batch back, if it has any, or let it wait no longer."""
        with self._freed:
            self._go_on(batch)
            for digest in self._batches.pop(batch, ()):
                if self.values.is_cuda:
                    self._left[digest] = torch.cuda.Event()
                    self._left[digest].record()
            self._freed.notify_all()

    def load_if_free(self, digest: str, factors: Factors) -> bool:
        """Put an adapter into a slot that no batch holds, if there is one."""
        with self._freed:
            if digest in self._slot_of or self._closed or not self._has_room([digest]):
                return digest in self._slot_of
            self._assign(digest, factors)
            return True

    def pin(self, digests: Collection[str]) -> None:
        """Never evict these, from now on."""
        with self._freed:
            self._pinned |= set(digests)
            self._freed.notify_all()

    def unpin(self, digests: Collection[str]) -> None:
        """Let these be evicted."""
        with self._freed:
            self._pinned -= set(digests)
            self._freed.notify_all()

    def close(self) -> None:
        """Take no more batches.

        Raises:
            ValueError: some run, or wait; nothing has changed then.
        """
        with self._freed:
            if self._batches or self._waiting:
                raise ValueError(
                    f"{len(self._batches) + len(self._waiting)} batches are in the bank; leave their "
                    "`with bank.rows(...)` blocks before it is closed"
                )
            self._closed = True

    def pinned(self) -> int:
        """How many are pinned."""
        return len(self._pinned)

    def __contains__(self, digest: object) -> bool:
        return digest in self._slot_of

    def used(self) -> int:
        """How many slots hold an adapter."""
        return len(self._slot_of)

    def in_use(self) -> int:
        """How many slots batches hold now."""
        with self._freed:
            return len(self._held())

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.values.nbytes + self.heads.nbytes

    def _loaded(self, digests: Collection[str], load: Callable[[str], Factors]) -> Mapping[str, Factors]:
        """Rows of those without a slot, read outside of the lock, since other batches go on meanwhile."""
        with self._freed:
            missing: Sequence[str] = [digest for digest in digests if digest not in self._slot_of]
        return {digest: load(digest) for digest in missing}

    def _held(self) -> set[str]:
        return set(chain.from_iterable(self._batches.values()))

    def _go_on(self, batch: object) -> None:
        if batch in self._waiting:
            self._waiting.remove(batch)
            self._freed.notify_all()

    def _check_count(self, digests: Collection[str]) -> None:
        if self._closed:
            raise ValueError("the bank was closed; make a new one")
        if len(digests) + (pinned := len(self._pinned.difference(digests))) > self.count:
            raise ValueError(
                f"names: a batch has {len(digests)} different adapters, and the bank {self.count} slots, {pinned} of "
                "them pinned for others; make smaller batches, or a bank with more slots"
            )

    def _has_room(self, digests: Collection[str]) -> bool:
        # What was pinned while the batch waited may leave too few, for ever.
        self._check_count(digests)
        held = self._held().union(self._pinned, digests)
        free = len(self._unused) + sum(digest not in held for digest in self._slot_of)
        return sum(digest not in self._slot_of for digest in digests) <= free

    def _assign(self, digest: str, factors: Factors) -> None:
        if not self._unused:
            held = self._held() | self._pinned
            oldest = next(other for other in self._slot_of if other not in held)
            self._unused.append(self._slot_of.pop(oldest))
            self.evictions += 1
            if (left := self._left.pop(oldest, None)) is not None:
                left.wait()
        # Unused until it is whole: what fails or is interrupted loses no slot.
        self._put(self._unused[-1], factors)
        self._slot_of[digest] = self._unused.pop()

    @torch.no_grad()
    def _put(self, slot: int, factors: Factors) -> None:
        with torch.inference_mode(False):
            _copy(self.values, slot, factors.row)
            _copy(self.heads, slot, factors.heads)


def _copy(into: Tensor, slot: int, row: Tensor) -> None:
    if row.numel():
        into[slot].copy_(row)
