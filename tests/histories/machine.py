"""A history: a seed names a model and a list of operations, after each of which everything is checked."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tests.histories import (  # noqa: F401  # they enter their operations
    interruptions,
    merges,
    passes,
    states,
    threads,
    writes,
)
from tests.histories.checks import check
from tests.histories.operations import OPERATIONS, Case
from tests.histories.refusals import REFUSALS
from tests.histories.shadow import Shadow
from tests.histories.subjects import Settings, made

HANGS = 120
"""Seconds after which a history is taken for one that waits for itself."""
LENGTH = 40
"""Operations that are drawn; those whose time has not come do nothing."""


class Step(NamedTuple):
    """An operation, and the seed of all that it draws."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}:{self.seed}"


class Failure(NamedTuple):
    """How a history ended."""

    step: Step | None
    """None: the model was wrong from the start."""
    error: str
    trace: str

    @property
    def kind(self) -> str:
        """What two failures of one cause have in common: everything but numbers."""
        words = re.sub(r"[-+]?\d[\d.e+-]*", "#", self.error)[:70]
        return f"{self.step and self.step.name}: {words}"


class History(NamedTuple):
    """A seed for the model, and steps."""

    seed: int
    steps: tuple[Step, ...]
    left_out: frozenset[str] = frozenset()

    @classmethod
    def drawn(cls, seed: int, left_out: frozenset[str] = frozenset(), length: int = LENGTH) -> History:
        """The history of a seed."""
        rng = np.random.default_rng([seed, 1])
        weights = np.array([operation.weight for operation in OPERATIONS.values()])
        drawn = rng.choice(len(weights), length, p=weights / weights.sum())
        names = list(OPERATIONS)
        steps = tuple(Step(names[index], int(rng.integers(10**6))) for index in drawn)
        return cls(seed, tuple(step for step in steps if step.name not in left_out), left_out)

    def settings(self) -> Settings:
        """Of the model."""
        return Settings.drawn(np.random.default_rng([self.seed, 0]), self.left_out)

    def run(self) -> tuple[int, Failure | None]:
        """The number of operations done, and the failure.

        In a thread of its own, because memory that is spoilt for a thread must not spoil the next history.
        """
        ended: list[tuple[int, Failure | None]] = []
        thread = threading.Thread(target=lambda: ended.append(self._run()), daemon=True)
        thread.start()
        thread.join(HANGS)
        return ended[0] if ended else (0, Failure(None, f"the history has not ended after {HANGS} seconds", ""))

    def shortened(self, failure: Failure) -> tuple[History, Failure]:
        """The shortest list of steps that still fails in the same way, and how."""
        steps = self.steps
        if failure.step is not None:
            steps = steps[: steps.index(failure.step) + 1]
        size = max(1, len(steps) // 2)
        while True:
            for start in range(0, len(steps), size):
                fewer = self._replace(steps=steps[:start] + steps[start + size :])
                _, again = fewer.run()
                if again is not None and again.kind == failure.kind:
                    steps, failure = fewer.steps, again
                    break
            else:
                if size == 1:
                    return self._replace(steps=steps), failure
                size //= 2

    def __str__(self) -> str:
        return f"--seed {self.seed} --steps {','.join(map(str, self.steps)) or 'none'}" + "".join(
            f" --without {name}" for name in sorted(self.left_out)
        )

    def _run(self) -> tuple[int, Failure | None]:
        settings, rng = self.settings(), np.random.default_rng([self.seed, 2])
        done, step = 0, None
        try:
            shadow = Shadow.drawn(settings, rng)
            x = torch.zeros(5, settings.width)
            case = Case(settings, made(settings, shadow), shadow, x)
            check(case, rng)
            for step in self.steps:
                if OPERATIONS[step.name].when(case):
                    _apply(step, case)
                    done += 1
        except Exception as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            return done, Failure(step, message, traceback.format_exc())
        return done, None


def _apply(step: Step, case: Case) -> None:
    rng = np.random.default_rng([step.seed, 0])
    refusals = [refusal for refusal in REFUSALS.get(step.name, ()) if refusal.when(case)]
    try:
        OPERATIONS[step.name].run(case, rng)
    except tuple(refusal.error for refusal in refusals) as error:
        if not any(isinstance(error, each.error) and re.search(each.says, str(error)) for each in refusals):
            raise
    check(case, np.random.default_rng([step.seed, 1]))


def shown(history: History, failure: Failure, done: Sequence[Step] = ()) -> str:
    """A failure, and how to see it again."""
    return (
        f"\n{history.settings()}\n{failure.trace}\nafter {', '.join(map(str, history.steps))}\n"
        f"again: python -m tests.histories {history}\n"
    )
