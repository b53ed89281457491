"""Operations of two threads: what is written while a pass runs is served afterwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tests.histories.checks import check_outputs, drawn_like
from tests.histories.lines import at_line, elsewhere
from tests.histories.operations import OUTPUTS, Case, MismatchError, Rng, operation, unmerged
from tests.histories.shadow import Shadow
from tests.histories.subjects import keys
from tests.histories.writes import (
    COUNTED,
    UNCOUNTED,
    as_held,
    base_names,
    entered,
    other_values,
    vector_names,
    write_vectors,
)

READ_ONCE = ("magnitude", "lambda_b")
"""Vectors that a pass reads once: one that is written to meanwhile gives the outputs of before or after."""
KEEPING = ("weight/", "matrices/shared_input", "method/functional", "method/gain")
"""Files that keep what was made from values."""
ROUNDS, READERS, MOMENTS = 25, 2, 4


@operation(3, unmerged)
def write_in_the_middle_of_a_pass(case: Case, rng: Rng) -> None:
    """Another thread writes at one line of an evaluation that finds nothing kept, or something."""
    for _ in range(MOMENTS):
        if rng.random() < 0.7:
            write_vectors(case, rng)
        _write_at_one_line(case, rng)
        check_outputs(case, rng)


def _write_at_one_line(case: Case, rng: Rng) -> None:
    names, write = _to_write(case, rng)
    values = as_held(case, other_values(case, rng, names))
    x = drawn_like(rng, (3, case.settings.width), case.shadow.dtype)
    before = case.shadow.outputs(x)
    number, files = (int(rng.integers(1, 1500)), ("",)) if rng.random() < 0.3 else (int(rng.integers(1, 560)), KEEPING)
    with torch.no_grad(), at_line(number, lambda: elsewhere(lambda: write(values)), files) as lines:
        y = case.model(x)
    if lines[1]:
        entered(case, values)
    if all(name.rpartition(".")[2] in READ_ONCE for name in names) and len(names) == 1:
        _check_is_one_of(y, [before, case.shadow.outputs(x)], case.shadow, "outputs of a pass with a write in it")


@operation(1, unmerged)
def threads(case: Case, rng: Rng) -> None:
    """Two threads evaluate while this one writes one value after another."""
    candidates = [name for name in vector_names(case) if name.rpartition(".")[2] in READ_ONCE]
    name = candidates[int(rng.integers(len(candidates)))]
    index = int(rng.integers(len(case.shadow[name])))
    values = [as_held(case, other_values(case, rng, [name]))[name][index] for _ in range(ROUNDS)]
    x = drawn_like(rng, (3, case.settings.width), case.shadow.dtype)
    states, expected = case.shadow, []
    for value in [case.parameter(name).detach()[index].clone(), *values]:
        states[name] = states[name].index_put((torch.tensor(index),), value.double())
        expected.append(states.outputs(x))
    begun, ended, seen = [0], [0], []

    def read() -> None:
        while ended[0] < ROUNDS:
            first = ended[0]
            with torch.no_grad():
                y = case.model(x)
            seen.append((y, first, begun[0]))

    with _hasty():
        readers = [threading.Thread(target=read) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        vector = case.parameter(name).detach()
        for number, value in enumerate(values, 1):
            begun[0] = number
            vector[index] = value  # of four or eight bytes, which no reader sees half written
            ended[0] = number
            threading.Event().wait(2e-4)
        for reader in readers:
            reader.join()
    for y, first, last in seen:
        _check_is_one_of(y, expected[first : last + 1], case.shadow, "outputs while another thread wrote")


def _to_write(case: Case, rng: Rng) -> tuple[list[str], Callable[[dict[str, Tensor]], None]]:
    """Some names, and how all of them are written."""
    draw = rng.random()
    if draw < 0.15:
        names = case.shadow.names()
        return names, lambda values: case.model.load_state_dict(
            {keys(case.model, names)[n]: v for n, v in values.items()}
        )
    of_base = draw < 0.35
    names, ways = (base_names(case), COUNTED) if of_base else (vector_names(case), [*COUNTED, *UNCOUNTED])
    if draw > 0.6:
        names = [names[int(rng.integers(len(names)))]]
    way = ways[int(rng.integers(len(ways)))]

    def write(values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            way(case, name, value)

    return names, write


@contextmanager
def _hasty() -> Iterator[None]:
    """Threads that take turns after microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _check_is_one_of(y: Tensor, expected: list[Tensor], shadow: Shadow, what: str) -> None:
    deviations = [float((y.double() - each).abs().max() / each.abs().max()) for each in expected]
    if not min(deviations) <= OUTPUTS[shadow.coarsest]:
        raise MismatchError(f"{what}: off by {min(deviations):.3g} of 1 from the nearest of {len(expected)} states")
