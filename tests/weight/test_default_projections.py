"""The process-wide default projections."""

import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import dvora
from dvora import DVoRAAdapter, SharedProjections
from tests.cases import linear, randn


def test_nothing_is_initialized_until_it_is_asked_for() -> None:
    assert not dvora.are_shared_matrices_initialized()
    dvora.initialize_shared_matrices(6, 5, 3)
    assert dvora.are_shared_matrices_initialized()
    dvora.reset_shared_matrices()
    assert not dvora.are_shared_matrices_initialized()


def test_the_error_without_them_shows_the_call_that_makes_them() -> None:
    with pytest.raises(ValueError, match="not initialized") as caught:
        DVoRAAdapter(linear(6, 5), rank=3)
    (call,) = re.findall(r"dvora\.initialize_shared_matrices\(.*?\)", str(caught.value))
    eval(call)  # the call as printed
    DVoRAAdapter(linear(6, 5), rank=3)


@pytest.mark.parametrize(("seed", "named"), [(None, 0), (0, 0), (17, 17)])
def test_layers_use_the_matrices_of_the_seed(seed: int | None, named: int) -> None:
    dvora.initialize_shared_matrices(6, 5, 3, seed=seed)
    layer = DVoRAAdapter(linear(6, 5), 3)
    assert torch.equal(layer.shared.A(3, 6), SharedProjections(named).A(3, 6))


def test_layers_share_one_pair() -> None:
    dvora.initialize_shared_matrices(6, 5, 3)
    assert DVoRAAdapter(linear(6, 5), 3).shared is DVoRAAdapter(linear(2, 4), 1).shared


def test_larger_layers_than_announced_get_the_same_values() -> None:
    dvora.initialize_shared_matrices(2, 2, 1, seed=4)
    layer = DVoRAAdapter(linear(60, 50), 30)
    assert torch.equal(layer.shared.A(30, 60), SharedProjections(4).A(30, 60))


def test_a_layer_given_its_own_projections_needs_no_default() -> None:
    shared = SharedProjections(1)
    assert DVoRAAdapter(linear(6, 5), 3, shared=shared).shared is shared
    assert not dvora.are_shared_matrices_initialized()


@pytest.mark.parametrize("again", [dvora.reset_shared_matrices, lambda: dvora.initialize_shared_matrices(6, 5, 3, 9)])
def test_layers_that_exist_keep_their_matrices(again) -> None:
    dvora.initialize_shared_matrices(6, 5, 3, seed=1)
    layer = DVoRAAdapter(linear(6, 5), 3)
    with torch.no_grad():
        layer.lambda_b.fill_(1)
    x, shared = randn(4, 6, seed=0), layer.shared
    expected = layer(x)
    again()
    assert layer.shared is shared
    assert torch.equal(layer(x), expected)


def test_initializing_again_replaces_the_default() -> None:
    dvora.initialize_shared_matrices(6, 5, 3, seed=1)
    dvora.initialize_shared_matrices(6, 5, 3, seed=2)
    assert DVoRAAdapter(linear(6, 5), 3).shared.seed == 2


BAD = [
    ({"input_size": 0}, ValueError, "input_size must be a positive integer, got 0"),
    ({"output_size": -2}, ValueError, "output_size must be a positive integer, got -2"),
    ({"input_size": 2.0}, TypeError, "input_size must be a positive integer, got 2.0 of type float"),
    ({"output_size": True}, TypeError, "output_size must be a positive integer, got True of type bool"),
    ({"rank": 0}, ValueError, "rank must be a positive integer, got 0"),
    ({"rank": "8"}, TypeError, "rank must be a positive integer, got '8'"),
    ({"seed": -1}, ValueError, "seed must lie in"),
    ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[str(wrong) for wrong, _, _ in BAD])
def test_bad_sizes_are_refused_and_leave_the_default_as_it_was(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    dvora.initialize_shared_matrices(6, 5, 3, seed=5)
    with pytest.raises(error, match=re.escape(message)):
        dvora.initialize_shared_matrices(**{"input_size": 6, "output_size": 5, "rank": 3, **wrong})
    assert DVoRAAdapter(linear(6, 5), 3).shared.seed == 5


def hammer(seed: int) -> bool:
    """Initialize, use and reset; every layer made must have the matrices of some whole initialization."""
    whole, layer = True, DVoRAAdapter(linear(6, 5), 3, shared=SharedProjections(seed))
    for step in range(20):
        dvora.initialize_shared_matrices(4 + step, 3 + step, 1 + step % 3, seed=seed)
        with contextlib.suppress(ValueError):  # another thread may have reset them in between
            layer = DVoRAAdapter(linear(6, 5), 3)
        expected = SharedProjections(layer.shared.seed)
        whole &= torch.equal(layer.shared.A(3, 6), expected.A(3, 6))
        whole &= torch.equal(layer.shared.B(3, 5), expected.B(3, 5))
        dvora.reset_shared_matrices()
        dvora.are_shared_matrices_initialized()
    return whole


@pytest.fixture
def hasty_threads():
    """Threads that take turns after microseconds instead of milliseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_initialize_use_and_reset_at_once() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(hammer, range(8)))


@pytest.mark.usefixtures("hasty_threads")
def test_threads_may_grow_one_pair_at_once() -> None:
    shared, expected = SharedProjections(3), SharedProjections(3)

    def grow(size: int) -> bool:
        return all(torch.equal(shared.A(r, size), expected.A(r, size)) for r in range(1, 12))

    expected.reserve(12, 60, 60)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(grow, range(20, 60)))
