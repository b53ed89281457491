"""The matrices of PEFT's VeRA as a kind of projections: its values, cut to layers, and nothing larger."""

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import nn

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.vera import VeraSizes, vera_sizes
from tests.cases import randn

SIZES = VeraSizes(rank=6, in_features=40, out_features=33)


def shared(seed: int = 3) -> SharedProjections:
    return SharedProjections(seed, SIZES.distribution)


def test_the_name_tells_the_sizes() -> None:
    assert SIZES.distribution == "peft_vera(r=6, in=40, out=33)"
    assert vera_sizes(SIZES.distribution) == SIZES
    assert vera_sizes("kaiming_uniform") is None


@pytest.mark.parametrize("seed", [0, 3, 2**63])
def test_the_values_are_those_that_peft_draws(seed: int) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    A, B = _kaiming_init((6, 40), generator), _kaiming_init((33, 6), generator)
    assert torch.equal(shared(seed).A(6, 40), A)
    assert torch.equal(shared(seed).B(6, 33), B)
    assert torch.equal(shared(seed).A(6, 11), A[:, :11])
    assert torch.equal(shared(seed).B(6, 12), B[:12])


def test_products_are_those_with_the_matrices() -> None:
    projections = shared()
    A, B = projections.A(6, 20, torch.float64), projections.B(6, 25, torch.float64)
    x, z, d = (randn(4, size, seed=size, dtype=torch.float64) for size in (20, 6, 25))
    torch.testing.assert_close(projections.impl.project(x, 6), x @ A.T)
    torch.testing.assert_close(projections.impl.project_transpose(z, 20), z @ A)
    torch.testing.assert_close(projections.impl.expand(z, 25), z @ B.T)
    torch.testing.assert_close(projections.impl.expand_transpose(d, 6), d @ B)
    torch.testing.assert_close(projections.impl.gram(6, 20, torch.float64), A @ A.T)
    torch.testing.assert_close(projections.impl.select(torch.arange(20), 6, 20, torch.float64), A.T)


def test_the_fingerprint_is_of_all_values_and_sizes() -> None:
    prints = {shared(seed).fingerprint() for seed in range(4)}
    others = {SharedProjections(3, SIZES._replace(in_features=size).distribution).fingerprint() for size in (39, 41)}
    assert len(prints | others) == 6
    assert shared().fingerprint() == shared().fingerprint()


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    shared().reserve(6, 40, 33)
    shared().fingerprint()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(7, 40, 33), (6, 41, 33), (6, 40, 34)])
def test_nothing_larger_is_made_up(rank: int, inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="has matrices of rank 6 for at most"):
        shared().reserve(rank, inputs, outputs)


def test_a_layer_survives_the_meta_device() -> None:
    layer = DVoRAAdapter(nn.Linear(20, 25), rank=6, shared=shared(), direction="weight")
    A = layer.shared.A(6, 20)
    layer.to("meta").to_empty(device="cpu")
    assert torch.equal(layer.shared.A(6, 20), A)
