"""Which batch a call of a model is in.

A batch of a bank belongs to whoever entered it: a thread, within it an asyncio task, and a generator while it runs. A
call from anywhere else is refused, since it would get the adapters of somebody else's rows: a generator's next step may
run in another thread, in which another batch has begun. An ended batch serves nobody, wherever it was ended. A batch of
`adapter_names` begins and ends within one call of the model, where no generator or task of a user can stop.

The backward pass may repeat a checkpointed layer, on a GPU in a thread of its own. There the batch is known by the
backward pass: its first step is a hook on the model's outputs, which the batch has put there.

Dimensions: B rows of a batch, O out.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ..tensors import is_traced
from .gathered import GatheredRows

_Kind = TypeVar("_Kind")
batches_entered: ContextVar[tuple[Any, ...]] = ContextVar("dvora_batches", default=())
"""Batches that were entered in this context, the last one innermost; ended ones perhaps among them."""

_ENTER = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
}
"""What runs a generator as the beginning of a `with` block: the block is not in the generator, but around its yield."""


@contextmanager
def entered(batch: object) -> Iterator[None]:
    """Make a batch the innermost one of this context."""
    batches_entered.set((*batches_entered.get(), batch))
    try:
        yield
    finally:
        batches_entered.set(tuple(other for other in batches_entered.get() if other is not batch))


def innermost(kind: type[_Kind]) -> _Kind | None:
    """The batch of a kind that was entered last in this context."""
    for batch in reversed(batches_entered.get()):
        if isinstance(batch, kind):
            return batch
    return None


class Batch:
    """One batch of a bank, compared by identity.

    Args:
        rows: its adapters.
    """

    def __init__(self, rows: GatheredRows) -> None:
        self.rows = rows
        self.backward_passes: set[int] = set()
        """By autograd's number: those that began at outputs of this batch."""
        self.widths: dict[str, list[int]] = {}
        """Outputs of each row, by head, once it has run."""
        self._owner, self._generators = _owner(), _generators(sys._getframe(1))

    def is_running(self) -> bool:
        """Whether this call comes from where the batch was entered."""
        if self._owner != _owner():
            return False
        return not self._generators or self._generators <= set(_frames(sys._getframe(1)))

    def forget_frames(self) -> None:
        """Let go of what the batch was entered from."""
        self._generators = frozenset()

    def split(self, outputs: Tensor, head: str | None = None) -> list[Tensor]:
        """The outputs of a head by row, each without what was filled up for adapters with more outputs.

        Args:
            outputs: of the model in this batch, (B, ..., O).
            head: its name, if the model has several.

        Raises:
            ValueError: no such head has run in this batch, or the outputs are of other rows.
        """
        if (head is None and len(self.widths) != 1) or (head is not None and head not in self.widths):
            raise ValueError(f"head: {head!r} is none that has run in this batch: {sorted(self.widths)}")
        widths = next(iter(self.widths.values())) if head is None else self.widths[head]
        if len(outputs) != len(widths):
            raise ValueError(f"outputs has {len(outputs)} rows, and the batch {len(widths)}")
        return [row[..., :width] for row, width in zip(outputs, widths, strict=True)]


class Batches:
    """The batches of one bank that run now, and which of them a call belongs to."""

    def __init__(self) -> None:
        self._running: set[Batch] = set()
        self._lock = threading.Lock()
        self._closed = False
        self.have_factors = False
        """Whether an adapter of LoRA has ever been among them."""

    @contextmanager
    def entered(self, rows: GatheredRows) -> Iterator[Batch]:
        """Make a batch that of the calls from here.

        Raises:
            ValueError: they are in another one, or the bank was closed.
        """
        self.check_free()
        batch = Batch(rows)
        with self._lock:
            self.check_open()
            self._running.add(batch)
        with entered(batch):
            try:
                yield batch
            finally:
                # For all; `entered` ends it in this context, which may be another one than it was entered in.
                self._running.discard(batch)
                batch.forget_frames()

    def close(self) -> None:
        """Take no more batches.

        Raises:
            ValueError: some run; nothing has changed then.
        """
        with self._lock:
            if self._running:
                raise ValueError(
                    f"{len(self._running)} batches are in the bank, which would have the base's outputs; leave their "
                    "`with` blocks before it is closed"
                )
            self._closed = True

    def check_open(self) -> None:
        """Refuse what comes after the end.

        Raises:
            ValueError: the bank was closed.
        """
        if self._closed:
            raise ValueError("the bank was closed; make a new one")

    def check_free(self) -> None:
        """Refuse a second batch here.

        Raises:
            ValueError: this call is in one.
        """
        if self.current() is not None:
            raise ValueError("this call is in a batch of the bank already; leave its `with` block first")

    def current(self) -> Batch | None:
        """The batch that this call is in."""
        if (number := torch._C._current_graph_task_id()) != -1:
            # Whatever thread it runs in, and whatever batch that is in.
            batches = [batch for batch in list(self._running) if number in batch.backward_passes]
        else:
            batches = [batch for batch in batches_entered.get() if batch in self._running and batch.is_running()]
        if len(batches) > 1:
            raise ValueError("this call is in two batches of the bank, one of a generator; take one at a time")
        return batches[0] if batches else None

    def required(self) -> Batch:
        """The batch that this call is in.

        Raises:
            ValueError: it is in none.
            RuntimeError: it is compiled, exported, traced or transformed: a graph would give later batches the adapters
                of this one.
        """
        if is_traced():
            raise RuntimeError(
                "a model in an AdapterBank cannot be compiled, exported, traced or transformed by torch.func: call it "
                "as it is, or export it with its adapters (dvora export)"
            )
        batch = self.current()
        if batch is None:
            self._refuse()
        return batch

    def _refuse(self) -> NoReturn:
        advice = "call it within `with bank.rows(names):`, where None names the base, or close the bank"
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "the backward pass repeats a checkpointed layer of a bank's model and is in no batch: call backward() "
                "within `with tenants.rows(names):`, on what was computed from the model's outputs there"
            )
        if any(batch in self._running for batch in batches_entered.get()):
            raise ValueError(
                "the model was called outside of bank.rows(...), from another thread, task or generator than the one "
                f"that entered a batch here; a batch serves only the code that entered it: {advice}"
            )
        raise ValueError(
            "the model is in an AdapterBank and was called outside of bank.rows(...), so nobody said which adapter "
            f"each row has; {advice}. A batch is of the thread, the task and the generator that entered it"
        )


def _owner() -> tuple[int, object]:
    """This thread, and its asyncio task: a task that another one starts gets a copy of its context."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:
        return threading.get_ident(), None


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _generators(frame: FrameType) -> frozenset[FrameType]:
    """The generators that a call runs in. One may stop in the middle of a batch, and go on anywhere."""
    kinds = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    return frozenset(
        caller
        for caller in _frames(frame)
        if caller.f_code.co_flags & kinds and not (caller.f_back is not None and caller.f_back.f_code in _ENTER)
    )
