"""Adapters that are replaced while batches run, each version with the outputs that it has to give."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

import dvora
from dvora.flat import Layout
from tests.peft.kinds import Kind
from tests.peft.tiny import MODELS, inputs

X = inputs(MODELS["mlp"](), 1)["x"][0]
"""The input of one row."""
Expected = TypeVar("Expected")
PATIENCE = 30.0
"""Seconds until a short test counts as stuck."""


@torch.no_grad()
def of_x(model: nn.Module) -> Tensor:
    """The outputs of a float64 model for X."""
    return model(X.double()[None])[0]


class Versions(Generic[Expected]):
    """Flat vectors of one kind, and what the merged model of each gives.

    Args:
        kind: of adapter.
        count: how many.
        outputs: of a merged float64 model.
    """

    def __init__(self, kind: Kind, count: int, outputs: Callable[[nn.Module], Expected]) -> None:
        self.model = kind.trained()
        self.layout = Layout.of(self.model)
        start = self.layout.to_vector(self.model)
        generator = torch.Generator().manual_seed(0)
        self.vectors = [start + 0.5 * torch.rand(len(start), generator=generator) for _ in range(count)]
        self.base: Expected = outputs(kind.base().double())
        self.expected = [outputs(self._merged(vector)) for vector in self.vectors]

    def _merged(self, vector: Tensor) -> nn.Module:
        self.layout.from_vector(vector, self.model)
        return copy.deepcopy(self.model).double().merge_and_unload()


class Names(Generic[Expected]):
    """Names whose versions change in a bank, and which versions a batch may have.

    Args:
        bank: which knows what a vector is of.
        versions: of all of them.
    """

    def __init__(self, bank: dvora.AdapterBank, versions: Versions[Expected]) -> None:
        self.bank, self.versions = bank, versions
        self.begun: dict[str, list[int]] = {}
        """The versions of each name, from before a change began."""
        self.ended: dict[str, int] = {}
        """How many changes of each name have ended."""

    def add(self, name: str, version: int) -> None:
        self.begun[name], self.ended[name] = [version], 0
        self.bank.add(name, self.versions.vectors[version])

    def replace(self, name: str, version: int) -> None:
        self.begun[name].append(version)
        self.bank.replace(name, self.versions.vectors[version])
        self.ended[name] = len(self.begun[name]) - 1

    def before(self, names: Sequence[str | None]) -> list[int]:
        """To be asked before a batch takes its rows."""
        return [0 if name is None else self.ended[name] for name in names]

    def possible(self, names: Sequence[str | None], before: Sequence[int]) -> list[list[Expected]]:
        """To be asked when it has them: what each row may give."""
        return [
            [self.versions.base]
            if name is None
            else [self.versions.expected[version] for version in self.begun[name][first:]]
            for name, first in zip(names, before, strict=True)
        ]


def in_threads(*calls: Callable[[], Any], patience: float = PATIENCE) -> list[Any]:
    """The results of calls that run beside each other.

    Args:
        patience: seconds until one that has not ended counts as stuck.

    Raises:
        TimeoutError: one does not end.
    """
    pool = ThreadPoolExecutor(len(calls))
    futures = [pool.submit(call) for call in calls]
    try:
        return [future.result(patience) for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: it does not come.
    """
    for _ in range(int(PATIENCE / 0.002)):
        if condition():
            return
        threading.Event().wait(0.002)
    raise TimeoutError
