"""Layers that are evaluated in some threads while another thread writes to what they are made of."""

import threading
from collections.abc import Callable

import pytest
import torch

from dvora import DVoRAAdapter
from tests.cases import fresh_copy, randn, trained_layer

ROUNDS = 60


def write_vectors(layer: DVoRAAdapter, seed: int) -> None:
    layer.set_parameters(layer.get_parameters() * (1 + 0.1 * randn(layer.parameter_count, seed=seed)))


def step(layer: DVoRAAdapter, seed: int) -> None:
    optimizer = torch.optim.SGD(layer.vectors, lr=0.1)
    for vector in layer.vectors:
        vector.grad = randn(*vector.shape, seed=seed)
    optimizer.step()


def write_weight(layer: DVoRAAdapter, seed: int) -> None:
    with torch.no_grad():
        layer.base_layer.weight.copy_(randn(*layer.base_layer.weight.shape, seed=seed))


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("write", [write_vectors, step, write_weight])
def test_what_was_evaluated_during_a_write_is_not_served_after_it(write: Callable[[DVoRAAdapter, int], None]) -> None:
    layer, x = trained_layer(48, 32, 8).eval(), randn(2, 48, seed=0)
    stale = []
    for round_ in range(ROUNDS):
        stop = threading.Event()

        def evaluate(stop: threading.Event = stop) -> None:
            with torch.no_grad():
                while not stop.is_set():
                    layer(x)

        readers = [threading.Thread(target=evaluate) for _ in range(2)]
        for reader in readers:
            reader.start()
        for seed in range(3):
            write(layer, 3 * round_ + seed)
        stop.set()
        for reader in readers:
            reader.join()
        with torch.no_grad():
            if not torch.allclose(layer(x), fresh_copy(layer).eval()(x), rtol=1e-4, atol=1e-5):
                stale.append(round_)
    assert not stale
