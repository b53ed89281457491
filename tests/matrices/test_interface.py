"""The shared projections: values that are pinned, statistics, fingerprints, bad input."""

import hashlib

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import Tensor

from dvora.matrices.interface import FORMAT_VERSION, SharedProjections
from dvora.matrices.vera import VeraSizes, vera_sizes

# sha256 of A (24 x 40) and B (33 x 24) for seed 7, the first values of row 1 of A, of column 1 of B, the fingerprint.
# A change of any of them is a new format: raise FORMAT_VERSION.
PINNED = (
    "dfd38ab3e47f5df6b9795b5bd01fdf4127b7f085d4dd504031011f1ac4dd608a",
    "9db07be690e850c234ad0aef23d1533bf354277019c63bb3138a34529b076066",
    [0.28927338123321533, 0.26693156361579895, -0.30250629782676697],
    [0.005861788988113403, 0.42715975642204285, -0.3227138817310333],
    "c2c23e1275dc0fb8",
)


def sha256(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def test_values_are_pinned() -> None:
    A_digest, B_digest, row_of_A, column_of_B, fingerprint = PINNED
    shared = SharedProjections(7)
    A, B = shared.A(24, 40), shared.B(24, 33)
    assert FORMAT_VERSION == 1
    assert A[1, :3].tolist() == row_of_A
    assert B[:3, 1].tolist() == column_of_B
    assert (sha256(A), sha256(B)) == (A_digest, B_digest)
    assert shared.fingerprint() == fingerprint


def test_fingerprints_tell_seeds_apart() -> None:
    assert len({SharedProjections(seed).fingerprint() for seed in (0, 1, 2**64 - 1)}) == 3


@pytest.mark.parametrize(
    ("seed", "distribution", "error", "message"),
    [
        *(
            (seed, "kaiming_uniform", TypeError, f"seed must be an integer, got {seed!r}")
            for seed in (True, 1.0, "1", None)
        ),
        *((seed, "kaiming_uniform", ValueError, rf"seed must lie in .*, got {seed}") for seed in (-1, 2**64)),
        (0, "gaussian", ValueError, r"unknown distribution 'gaussian', expected 'kaiming_uniform'"),
        (0, "structured", ValueError, r"unknown distribution 'structured'.*the version that saved it"),
    ],
)
def test_an_unknown_seed_or_distribution_is_refused_with_the_known_ones(
    seed: object, distribution: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SharedProjections(seed, distribution)


# The matrices of PEFT's VeRA: its values, cut to layers, and nothing larger.


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


def test_the_fingerprint_is_of_all_values_and_sizes() -> None:
    prints = {shared(seed).fingerprint() for seed in range(4)}
    others = {SharedProjections(3, SIZES._replace(in_features=size).distribution).fingerprint() for size in (39, 41)}
    assert len(prints | others) == 6
    assert shared().fingerprint() == shared().fingerprint()


@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(7, 40, 33), (6, 41, 33), (6, 40, 34)])
def test_nothing_larger_is_made_up(rank: int, inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="has matrices of rank 6 for at most"):
        shared().reserve(rank, inputs, outputs)
