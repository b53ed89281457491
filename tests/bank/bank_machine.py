"""A history of one bank: adapters come, change and go while batches run in other threads, beside a plain dictionary."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import dvora
from dvora.bank.packs import write_pack
from tests.bank.adapters import HEADED
from tests.bank.versions import PATIENCE, Versions
from tests.peft.kinds import saved
from tests.peft.tiny import MODELS, inputs

NAMES = ["ann", "bob", "cleo", "dora", "eve"]
VERSIONS, SLOTS, HOST_ROWS = 6, 3, 2
X = inputs(MODELS["mlp"](), 1)["x"][0]
CLOSE = {torch.float32: 2e-5, torch.float16: 3e-3}

names_, versions_ = st.sampled_from(NAMES), st.integers(0, VERSIONS - 1)
rows_ = st.lists(st.sampled_from([None, *NAMES]), min_size=1, max_size=5)
sources_ = st.sampled_from(["vector", "folder", "pack"])


@torch.no_grad()
def of_x(model: nn.Module) -> Tensor:
    return model(X.double()[None])[0]


class Saved:
    """Versions of adapters as vectors, folders and packs."""

    def __init__(self) -> None:
        self.versions = Versions(HEADED, VERSIONS, of_x)
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
        rows: what each row gives.
    """

    def __init__(self, thread: ThreadPoolExecutor, rows: list[int | None]) -> None:
        self.thread, self.rows, self.stack = thread, rows, ExitStack()

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        return self.thread.submit(function, *args).result(PATIENCE)


class BankMachine(RuleBasedStateMachine):
    """`self.bank` serves what `self.held` says."""

    steps_by_rule: ClassVar[Counter[str]] = Counter()

    @initialize(dtype=st.sampled_from(list(CLOSE)))
    def begin(self, dtype: torch.dtype) -> None:
        self.saved, self.dtype = saved_versions(), dtype
        self.model = HEADED.base().requires_grad_(False)
        one = 2 * (2 * 24 + 4) * dtype.itemsize + 4 * 24 * 6
        self.bank = dvora.AdapterBank(
            self.model, slots=SLOTS, host_bytes=HOST_ROWS * one, dtype=dtype, like=self.saved.folder / "0"
        )
        self.limit = HOST_ROWS * one
        self.held: dict[str, int] = {}
        self.open: list[Open] = []
        self.threads = [ThreadPoolExecutor(1) for _ in range(2)]
        for version, name in enumerate(NAMES[:3]):
            # Or short histories would find nothing to replace or remove.
            self._add(name, version, "vector")
            self.held[name] = version
        self.count("begin")

    def count(self, step: str) -> None:
        self.steps_by_rule[step] += 1

    def teardown(self) -> None:
        if hasattr(self, "bank"):
            while self.open:
                self._leave(self.open[0])
            self.bank.close()
            assert torch.equal(self.model(X), HEADED.base()(X))
            for thread in self.threads:
                thread.shutdown()

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "bank"):
            return
        stats = self.bank.stats()
        assert sorted(self.bank) == sorted(self.held)
        assert stats.adapters == len(self.held)
        assert stats.slots_in_use == len(self._in_use())
        assert stats.slots_filled <= SLOTS
        assert stats.host_bytes <= self.limit
        assert stats.host_adapters <= HOST_ROWS
        for batch in self.open:
            self._check(batch.rows, batch.call(self._outputs, len(batch.rows)))

    @rule(name=names_, version=versions_, source=sources_)
    def add(self, name: str, version: int, source: str) -> None:
        before = self.bank.stats()
        if name in self.held:
            with pytest.raises(ValueError, match=f"there is an adapter '{name}' already"):
                self._add(name, version, source)
            assert self.bank.stats() == before
            self.count("refused: a taken name")
        else:
            self._add(name, version, source)
            self.held[name] = version
            self.count(f"add {source}")

    @rule(name=names_, version=versions_, source=st.sampled_from(["vector", "folder"]))
    def replace(self, name: str, version: int, source: str) -> None:
        if name not in self.held:
            with pytest.raises(ValueError, match=f"there is no adapter '{name}'"):
                self.bank.replace(name, self._source(version, source))
            self.count("refused: replace nobody")
            return
        self.bank.replace(name, self._source(version, source))
        self.held[name] = version
        self.count("replace")

    @rule(name=names_)
    def remove(self, name: str) -> None:
        if name not in self.held:
            with pytest.raises(ValueError, match="there is no adapter"):
                self.bank.remove(name)
            self.count("refused: remove nobody")
            return
        self.bank.remove(name)
        del self.held[name]
        self.count("remove")

    @rule(rows=rows_)
    def batch(self, rows: list[str | None]) -> None:
        if unknown := [name for name in rows if name is not None and name not in self.held]:
            with pytest.raises(ValueError, match="there is no adapter"), self.bank.rows(rows):
                pass
            self.count(f"refused: {'one' if len(unknown) == 1 else 'some'} unknown")
            return
        versions = self._versions(rows)
        if len(self._distinct(versions)) > SLOTS:
            with pytest.raises(ValueError, match="different adapters, and the bank 3 slots"), self.bank.rows(rows):
                pass
            self.count("refused: more than slots")
        elif self._has_room(versions):
            with self.bank.rows(rows):
                self._check(versions, self._outputs(len(rows)))
            self.count("batch")

    @precondition(lambda self: self.threads_free())
    @rule(rows=rows_)
    def begin_a_batch(self, rows: list[str | None]) -> None:
        rows = [name if name in self.held else None for name in rows]
        versions = self._versions(rows)
        if not self._has_room(versions):
            return
        batch = Open(self.threads_free()[0], versions)
        batch.call(batch.stack.enter_context, self.bank.rows(rows))
        self.open.append(batch)
        self.count("begin a batch")

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave_a_batch(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(self.open)))
        self.count("leave a batch")

    @rule(version=versions_)
    def refuse(self, version: int) -> None:
        vector = self.saved.versions.vectors[version]
        for wrong, message in ((vector[1:], "vector has shape"), (vector / 0, "not finite")):
            with pytest.raises(ValueError, match=message):
                self.bank.add("new", wrong)
            for name in self.held:
                with pytest.raises(ValueError, match=message):
                    self.bank.replace(name, wrong)
        self.count("refused: wrong values")

    def threads_free(self) -> list[ThreadPoolExecutor]:
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

    def _versions(self, rows: Sequence[str | None]) -> list[int | None]:
        return [None if name is None else self.held[name] for name in rows]

    @staticmethod
    def _distinct(versions: Sequence[int | None]) -> set[int]:
        return {version for version in versions if version is not None}

    def _in_use(self) -> set[int]:
        return self._distinct([version for batch in self.open for version in batch.rows])

    def _has_room(self, versions: Sequence[int | None]) -> bool:
        """Whether a batch surely has not to wait for those that run."""
        return len(self._distinct(versions) | self._in_use()) <= SLOTS

    @torch.no_grad()
    def _outputs(self, rows: int) -> Tensor:
        return self.model(X.expand(rows, -1))

    def _check(self, versions: Sequence[int | None], found: Tensor) -> None:
        every = self.saved.versions
        expected = [every.base if version is None else every.expected[version] for version in versions]
        assert float((found.double() - torch.stack(expected)).abs().max()) < CLOSE[self.dtype]
