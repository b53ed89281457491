"""Adapters come, change and go while batches run in other threads: the bank serves what a plain dictionary says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import dvora
from dvora.adapter_file.packs import write_pack
from tests.bank.tenants import HEADED
from tests.bank.versions import PATIENCE, Versions, X
from tests.peft.kinds import saved

SHORT, LONG, STEPS = 80, 1000, 20
"""Histories in a short run and in a long one, and their steps."""
NAMES = ["ann", "bob", "cleo", "dora", "eve"]
VERSIONS, SLOTS, HOST_ROWS = 6, 3, 2
CLOSE = {torch.float32: 2e-5, torch.float16: 3e-3}

names_, versions_ = st.sampled_from(NAMES), st.integers(0, VERSIONS - 1)
rows_ = st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=5)


class Saved:
    """Versions of an adapter as vectors and as folders."""

    def __init__(self) -> None:
        self.versions = Versions(VERSIONS)
        self._kept = tempfile.TemporaryDirectory()
        self.folder = Path(self._kept.name)
        for number, vector in enumerate(self.versions.vectors):
            self.versions.layout.from_vector(vector, self.versions.model)
            saved(self.versions.model, self.folder / str(number))


@cache
def saved_versions() -> Saved:
    return Saved()


class Open:
    """A batch that runs in a thread of its own.

    Args:
        thread: with one worker.
        versions: what each row gives; None is the base.
    """

    def __init__(self, thread: ThreadPoolExecutor, versions: list[int | None]) -> None:
        self.thread, self.versions, self.stack = thread, versions, ExitStack()

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        return self.thread.submit(function, *args).result(PATIENCE)


class BankMachine(RuleBasedStateMachine):
    """`self.bank` serves what `self.held` says."""

    @initialize(dtype=st.sampled_from(list(CLOSE)))
    def begin(self, dtype: torch.dtype) -> None:
        self.saved, self.dtype = saved_versions(), dtype
        self.model = HEADED.base().requires_grad_(False)
        self.limit = HOST_ROWS * (2 * (2 * 24 + 4) * dtype.itemsize + 4 * 24 * 6)
        self.bank = dvora.AdapterBank(
            self.model, slots=SLOTS, host_bytes=self.limit, dtype=dtype, like=self.saved.folder / "0"
        )
        self.held: dict[str, int] = {}
        self.open: list[Open] = []
        self.slots: list[int] = []
        """Versions in slots, the least recently used first."""
        self.loads = self.evictions = 0
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        for version, name in enumerate(NAMES):
            # Or short histories would find nothing to replace, remove or evict.
            self.add(name, version, "vector")

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            while self.open:
                self._leave(self.open[0])
            self.bank.close()
            assert torch.equal(self.model(X), HEADED.base()(X))
            for thread in self.threads:
                thread.shutdown()

    @invariant()
    def counts_and_running_batches_are_right(self) -> None:
        if not hasattr(self, "bank"):
            return
        stats = self.bank.stats()
        assert sorted(self.bank) == sorted(self.held)
        assert stats.adapters == len(self.held)
        assert stats.slots_in_use == len(self._in_use())
        assert stats.slots_filled == len(self.slots)
        assert (stats.loads, stats.evictions) == (self.loads, self.evictions)
        assert stats.host_bytes <= self.limit
        assert stats.host_adapters <= HOST_ROWS
        for batch in self.open:
            self._check(batch.versions, batch.call(self._outputs, len(batch.versions)))

    @rule(name=names_, version=versions_, source=st.sampled_from(["vector", "folder", "pack"]))
    def add(self, name: str, version: int, source: str) -> None:
        if name in self.held:
            with pytest.raises(ValueError, match=f"there is an adapter '{name}' already"):
                self._add(name, version, source)
        else:
            self._add(name, version, source)
            self.held[name] = version

    @rule(name=names_, version=versions_, source=st.sampled_from(["vector", "folder"]))
    def replace(self, name: str, version: int, source: str) -> None:
        if name not in self.held:
            with pytest.raises(ValueError, match=f"there is no adapter '{name}'"):
                self.bank.replace(name, self._source(version, source))
        else:
            self.bank.replace(name, self._source(version, source))
            self.held[name] = version

    @rule(name=names_)
    def remove(self, name: str) -> None:
        if name not in self.held:
            with pytest.raises(ValueError, match="there is no adapter"):
                self.bank.remove(name)
        else:
            self.bank.remove(name)
            del self.held[name]

    @rule(rows=rows_)
    def batch(self, rows: list[str | None]) -> None:
        if any(name is not None and name not in self.held for name in rows):
            with pytest.raises(ValueError, match="there is no adapter"), self.bank.rows(rows):
                pass
            return
        versions = self._versions(rows)
        if len(self._distinct(versions)) > SLOTS:
            with pytest.raises(ValueError, match="different adapters, and the bank 3 slots"), self.bank.rows(rows):
                pass
        elif self._has_room(versions):
            with self.bank.rows(rows):
                self._check(versions, self._outputs(len(rows)))
            self._use(versions)

    @precondition(lambda self: self._threads_free())
    @rule(rows=rows_)
    def begin_a_batch(self, rows: list[str | None]) -> None:
        rows = [name if name in self.held else None for name in rows]
        versions = self._versions(rows)
        if self._has_room(versions):
            batch = Open(self._threads_free()[0], versions)
            batch.call(batch.stack.enter_context, self.bank.rows(rows))
            self.open.append(batch)
            self._use(versions)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave_a_batch(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(self.open)))

    def _threads_free(self) -> list[ThreadPoolExecutor]:
        return [thread for thread in self.threads if all(batch.thread is not thread for batch in self.open)]

    def _add(self, name: str, version: int, source: str) -> None:
        if source != "pack":
            self.bank.add(name, self._source(version, source))
            return
        with tempfile.TemporaryDirectory() as folder:
            write_pack(Path(folder) / "pack", {name: self.saved.folder / str(version)})
            assert self.bank.add_pack(Path(folder) / "pack") == [name]

    def _source(self, version: int, source: str) -> Any:
        return self.saved.versions.vectors[version] if source == "vector" else self.saved.folder / str(version)

    def _leave(self, batch: Open) -> None:
        batch.call(batch.stack.close)
        self.open.remove(batch)

    def _use(self, versions: Sequence[int | None]) -> None:
        """What a batch does to the slots: the least recently used version leaves, but none that a batch has."""
        distinct = list(dict.fromkeys(version for version in versions if version is not None))
        for version in distinct:
            if version not in self.slots:
                self.loads += 1
                if len(self.slots) == SLOTS:
                    kept = self._in_use().union(distinct)
                    self.slots.remove(next(other for other in self.slots if other not in kept))
                    self.evictions += 1
                self.slots.append(version)
        self.slots.sort(key=lambda version: distinct.index(version) if version in distinct else -1)

    def _versions(self, rows: Sequence[str | None]) -> list[int | None]:
        return [None if name is None else self.held[name] for name in rows]

    @staticmethod
    def _distinct(versions: Sequence[int | None]) -> set[int]:
        return {version for version in versions if version is not None}

    def _in_use(self) -> set[int]:
        return self._distinct([version for batch in self.open for version in batch.versions])

    def _has_room(self, versions: Sequence[int | None]) -> bool:
        """Whether a batch has not to wait for those that run."""
        return len(self._distinct(versions) | self._in_use()) <= SLOTS

    @torch.no_grad()
    def _outputs(self, rows: int) -> Tensor:
        return self.model(X.expand(rows, -1))

    def _check(self, versions: Sequence[int | None], found: Tensor) -> None:
        every = self.saved.versions
        expected = [every.base if version is None else every.expected[version] for version in versions]
        assert float((found.double() - torch.stack(expected)).abs().max()) < CLOSE[self.dtype]


def test_after_every_step_the_bank_serves_what_the_dictionary_says(request: pytest.FixtureRequest) -> None:
    versions = saved_versions().versions
    every = [versions.base, *versions.expected]
    # They differ by more than any rounding.
    assert min(float((a - b).abs().max()) for i, a in enumerate(every) for b in every[:i]) > 10 * max(CLOSE.values())
    is_long = request.config.getoption("--fuzz")
    run_state_machine_as_test(
        BankMachine,
        settings=settings(
            max_examples=LONG if is_long else SHORT,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
            derandomize=not is_long,
            database=None,
        ),
    )
