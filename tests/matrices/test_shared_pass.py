"""One projection of shared inputs, within one pass of a model and from one pass to the next."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dvora.matrices.interface import DISTRIBUTIONS, SharedProjections
from dvora.ops.passes import Pass, enter, leave
from tests.cases import randn
from tests.census import Census

IN, RANK = 6, 3
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


@contextmanager
def in_pass(running: Pass | None = None) -> Iterator[Pass]:
    running, owner = running or Pass(), object()
    enter(owner, running)
    try:
        yield running
    finally:
        leave(owner)


@every_distribution
def test_readers_in_one_pass_share_and_one_that_asks_twice_does_not(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), randn(4, IN, seed=0)
    with in_pass():
        z = shared.project_once(x, RANK, "first")
        assert shared.project_once(x, RANK, "second") is z
        assert shared.project_once(x, RANK, "first") is not z
    assert torch.equal(z, shared.impl.project(x, RANK))


@every_distribution
def test_another_pass_gets_a_projection_of_its_own(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), randn(4, IN, seed=0)
    made = []
    with in_pass() as outer:
        made.append(shared.project_once(x, RANK, 0))
        with in_pass():
            made.append(shared.project_once(x, RANK, 1))
        made.append(shared.project_once(x, RANK, 2))
    made.append(shared.project_once(x, RANK, 3))
    with in_pass(outer):
        made.append(shared.project_once(x, RANK, 4))
    assert len({id(z) for z in made}) == len(made)
    assert all(torch.equal(z, made[0]) for z in made)


@every_distribution
def test_what_torch_counts_is_noticed_within_a_pass(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), randn(4, IN, seed=0)
    with in_pass():
        shared.project_once(x, RANK, "first")
        x.mul_(2)
        z = shared.project_once(x, RANK, "second")
    assert torch.equal(z, shared.impl.project(x, RANK))


def kept_by_a_projection(shared: SharedProjections, x: Tensor) -> int:
    """Bytes that are held afterwards, besides the projection."""
    with Census() as census:
        z = shared.project_once(x, RANK, object())
    return sum(census.held([z]))


@every_distribution
def test_inputs_are_copied_to_be_compared_outside_of_passes_only(distribution: str) -> None:
    shared, x = SharedProjections(3, distribution), randn(4, IN, seed=0)
    shared.project_once(x, RANK, "made before")
    with in_pass():
        assert kept_by_a_projection(shared, x) == 0
    assert kept_by_a_projection(shared, x) == x.nbytes
