"""Versions of one adapter with what each has to give, and calls in threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from dvora.flat import Layout
from tests.bank.tenants import HEADED, vectors_of
from tests.peft.tiny import MODELS, inputs

X = inputs(MODELS["mlp"](), 1)["x"][0]
"""The input of one row."""
PATIENCE = 30.0
"""Seconds until a short test counts as stuck."""


class Versions:
    """So many adapters with a head, as flat vectors, and what the merged float64 model of each gives for X."""

    def __init__(self, count: int) -> None:
        self.model = HEADED.trained()
        self.layout, self.vectors = Layout.of(self.model), vectors_of(HEADED, count)
        self.base = self._of_x(HEADED.base())
        self.expected = [self._of_x(self._merged(vector)) for vector in self.vectors]

    def _merged(self, vector: Tensor) -> nn.Module:
        self.layout.from_vector(vector, self.model)
        return copy.deepcopy(self.model).double().merge_and_unload()

    @staticmethod
    @torch.no_grad()
    def _of_x(model: nn.Module) -> Tensor:
        return model.double()(X.double()[None])[0]


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
