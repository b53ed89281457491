"""One projection of shared inputs, within one pass of a model and from one pass to the next.

`project_once` is asked by layers in any mode, `projected_in_pass` by those that follow a plan, without gradients.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dvora.matrices.interface import DISTRIBUTIONS, SharedProjections
from dvora.matrices.shared_input import projected_in_pass
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


# Without gradients.


class Planned:
    """Asks as layers that follow a plan do, and counts the products."""

    def __init__(self, distribution: str = "kaiming_uniform") -> None:
        self.impl, self.products = SharedProjections(3, distribution).impl, 0

    def __call__(self, x: Tensor, reader: object, running: Pass, rank: int = RANK) -> Tensor:
        prepared = self.impl.prepared_projection(rank, x.shape[-1], x.dtype, x.device)

        def project(x: Tensor) -> Tensor:
            self.products += 1
            return prepared(x)

        return projected_in_pass(x, rank, self.impl, reader, project, running)

    def expected(self, x: Tensor, rank: int = RANK) -> Tensor:
        return x.double() @ self.impl.A(rank, x.shape[-1], torch.float64).T


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, atol=1e-5)


@every_distribution
@pytest.mark.parametrize("tokens", [1, 4])
def test_planned_layers_in_one_pass_share_and_one_that_asks_twice_does_not(tokens: int, distribution: str) -> None:
    ask, x = Planned(distribution), randn(tokens, IN, seed=0)
    with in_pass() as running:
        z = ask(x, 1, running)
        assert ask(x, 2, running) is z
        assert ask(x, 3, running) is z
        assert ask.products == 1
        again = ask(x, 1, running)
        assert again is not z
        assert ask(x, 2, running) is again, "its readers are counted anew"
        assert ask(x, 2, running) is not again
        assert ask.products == 3
    assert close(z, ask.expected(x))
    assert torch.equal(z, again)


def test_a_layer_that_is_handed_a_projection_and_asks_again_gets_another() -> None:
    # Its second call may be a second run of the same layers, with something uncounted in between.
    ask, x = Planned(), randn(4, IN, seed=0)
    with in_pass() as running:
        ask(x, 1, running)
        handed = ask(x, 2, running)
        x.data.mul_(2)
        found = ask(x, 2, running)
    assert found is not handed
    assert close(found, ask.expected(x))


OTHER: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda x: x.mul_(2),
    "through a view": lambda x: x[1:3].zero_(),
    "in inference mode": lambda x: torch.inference_mode()(x.add_)(1),
    "copy_": lambda x: x.copy_(randn(*x.shape, seed=5)),
    "data assigned": lambda x: setattr(x, "data", randn(*x.shape, seed=5)),
    "data shifted": lambda x: setattr(x, "data", x._base.view(-1)[1 : 1 + x.numel()].view_as(x)),
    "data transposed": lambda x: setattr(x, "data", x.data.T),
    "data repeated": lambda x: setattr(x, "data", x.data[:, :1].expand_as(x)),
    "transposed in place": lambda x: x.t_(),
    "set_": lambda x: x.set_(randn(*x.shape, seed=5)),
}


@pytest.mark.parametrize("change", OTHER)
def test_planned_layers_notice_what_becomes_of_their_inputs(change: str) -> None:
    ask, x = Planned(), randn(IN + 1, IN, seed=0)[:IN]
    with in_pass() as running:
        before = ask(x, 1, running)
        OTHER[change](x)
        found = ask(x, 2, running)
    assert close(found, ask.expected(x))
    assert not close(found, before.double())


def test_planned_layers_with_other_inputs_ranks_or_matrices_do_not_share() -> None:
    ask, others, x = Planned(), Planned("structured"), randn(4, IN, seed=0)
    for asks in (
        lambda running: (ask(x, 1, running), ask(x.clone(), 2, running)),
        lambda running: (ask(x, 1, running), ask(x[:], 2, running)),
        lambda running: (ask(x, 1, running), ask(x, 2, running, rank=RANK + 1)),
        lambda running: (ask(x, 1, running), others(x, 2, running)),
    ):
        with in_pass() as running:
            first, second = asks(running)
            assert first is not second
    with in_pass() as running:
        assert close(ask(x, 1, running), ask.expected(x))
        assert close(ask(x, 2, running, rank=RANK + 1), ask.expected(x, RANK + 1))
        assert close(others(x, 3, running), others.expected(x))


def test_planned_layers_of_another_pass_do_not_share() -> None:
    ask, x, made = Planned(), randn(4, IN, seed=0), []
    with in_pass() as outer:
        made.append(ask(x, 1, outer))
        with in_pass() as within:
            made.append(ask(x, 2, within))
        assert ask(x, 3, outer) is made[0], "the pass within has its own"
    with in_pass(outer):
        made.append(ask(x, 4, outer))
    with in_pass() as later:
        x.data.mul_(2)
        made.append(ask(x, 5, later))
    assert len({id(z) for z in made}) == len(made) == ask.products
    assert close(made[-1], ask.expected(x))


def test_planned_layers_in_threads_have_passes_of_their_own() -> None:
    ask, x, made, barrier = Planned(), randn(4, IN, seed=0), [], threading.Barrier(2, timeout=20)

    def run() -> None:
        with in_pass() as running:
            z = ask(x, 1, running)
            barrier.wait()
            made.append(ask(x, 2, running) is z)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [True, True]


def test_inference_tensors_are_projected_every_time() -> None:
    ask = Planned()
    with torch.inference_mode(), in_pass() as running:
        x = randn(4, IN, seed=0)
        first, plain = ask(x, 1, running), running.projected
        x.mul_(2)
        second = ask(x, 2, running)
    assert plain is None
    assert close(second, ask.expected(x))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("ends", ["as it should", "by an exception"])
def test_nothing_is_kept_after_a_pass(ends: str) -> None:
    ask, x, running = Planned(), randn(4, IN, seed=0), Pass()
    ask(x, 1, Pass())  # makes A
    gc.disable()
    try:
        with Census() as census:
            try:
                with in_pass(running):
                    z = weakref.ref(ask(x, 1, running))
                    assert z() is not None
                    if ends == "by an exception":
                        raise KeyError
            except KeyError:
                pass
        assert z() is None
        assert census.held() == []
    finally:
        gc.enable()


def test_a_projection_does_not_keep_its_inputs_alive() -> None:
    ask, x = Planned(), randn(4, IN, seed=0)
    with in_pass() as running:
        ask(x, 1, running)
        known = weakref.ref(x)
        del x
        assert known() is None
        x = randn(4, IN, seed=1)
        assert close(ask(x, 2, running), ask.expected(x))
