"""The state of a merge, recorded before the weight is written, so that an interruption can be undone at any moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Intent:
    """One merge of one layer or of many: until `done` is set, every layer that meets it undoes it.

    One flag for all layers, so that the merge of a whole model takes effect, or is undone, at one moment.
    """

    def __init__(self) -> None:
        self.done = False
        self._thread: int | None = get_ident()

    def revoke(self) -> None:
        """Let every layer undo it."""
        self._thread = get_ident()
        self.done = False

    def check_thread(self) -> None:
        """Refuse to undo what another thread may be doing now.

        Raises:
            RuntimeError: another thread merges or unmerges.
        """
        if self._thread not in (None, get_ident()):
            raise RuntimeError(
                "another thread is merging or unmerging the adapters of this model; wait for it. If it was "
                "interrupted, call unmerge_adapter"
            )

    def __getstate__(self) -> dict[str, Any]:
        # No thread works on a copy.
        return {"done": self.done, "_thread": None}


class Merge(NamedTuple):
    """The state of one weight with adapters merged into it."""

    adapters: tuple[str, ...]
    original: Tensor | None
    """The base's own weight, on the CPU; None if it was freed."""
    intent: Intent
    replaced: Tensor | None
    """The weight before this merge, on the CPU."""
    before: Merge | None
    """The state before this merge."""


class Merges:
    """The adapters that are merged into one weight, as a stack of states; `last` is replaced in one assignment."""

    def __init__(self) -> None:
        self.last: Merge | None = None

    @property
    def adapters(self) -> list[str]:
        """Names, in the order in which they were merged."""
        return [] if self.last is None else list(self.last.adapters)

    @property
    def original(self) -> Tensor | None:
        """The base's own weight; None where nothing is merged.

        Raises:
            ValueError: no copy of it was kept.
        """
        if self.last is None:
            return None
        if self.last.original is None:
            raise ValueError(f"{', '.join(self.last.adapters)} were merged for good: no copy of the weight was kept")
        return self.last.original

    def begin(self, adapters: Sequence[str], weight: Tensor, intent: Intent) -> None:
        """Record that adapters are merged next; undone unless the intent is fulfilled.

        Args:
            adapters: all that will be merged into the weight.
            weight: as it is now.
            intent: which must be fulfilled.
        """
        kept = weight.detach().to("cpu", copy=True)
        own = kept if self.last is None else self.last.original
        self.last = Merge(tuple(adapters), own, intent, kept, self.last)

    def rest_on(self, intent: Intent) -> None:
        """Make a finished merge depend on another intent, without which the base's own weight is restored."""
        if self.last is not None:
            original = self.original
            self.last = Merge(self.last.adapters, original, intent, original, None)

    def settle(self, write: Callable[[Tensor], None]) -> None:
        """Undo what is not done, and drop what is not needed any more.

        Args:
            write: sets the weight. It may be called again after an interruption.

        Raises:
            RuntimeError: another thread merges or unmerges.
        """
        last = merge = self.last
        weight = None
        while merge is not None and not merge.intent.done:
            merge.intent.check_thread()
            weight, merge = merge.replaced, merge.before
        if weight is not None:
            write(weight)
        if merge is not None and merge.before is not None:
            merge = merge._replace(replaced=merge.original, before=None)
        if merge is not last:
            self.last = merge

    def give_up_original(self) -> None:
        """Free the copy of the base's own weight; the merge is then permanent."""
        if self.last is not None:
            self.last = self.last._replace(original=None, replaced=None, before=None)

    def cast(self, dtype: torch.dtype) -> None:
        """Keep the base's own weight in the dtype that the weight was cast to."""
        if self.last is not None and self.last.original is not None:
            original = self.last.original.to(dtype)
            self.last = self.last._replace(original=original, replaced=original, before=None)
