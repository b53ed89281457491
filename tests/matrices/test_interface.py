"""The shared projections: values that are pinned, statistics, fingerprints, bad input."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.vera.model import _kaiming_init
from torch import Tensor

from dvora.matrices.interface import DISTRIBUTIONS, FORMAT_VERSION, SharedProjections
from dvora.matrices.structured import factors_of_rows, factors_of_size
from dvora.matrices.vera import VeraSizes, vera_sizes
from tests.reference import worst_error

# sha256 of A (24 x 40) and B (33 x 24) for seed 7, the first values of row 1 of A, of column 1 of B, the fingerprint.
# A change of any of them is a new format: raise FORMAT_VERSION.
PINNED = {
    "kaiming_uniform": (
        "dfd38ab3e47f5df6b9795b5bd01fdf4127b7f085d4dd504031011f1ac4dd608a",
        "9db07be690e850c234ad0aef23d1533bf354277019c63bb3138a34529b076066",
        [0.28927338123321533, 0.26693156361579895, -0.30250629782676697],
        [0.005861788988113403, 0.42715975642204285, -0.3227138817310333],
        "c2c23e1275dc0fb8",
    ),
    "structured": (
        "550bfadae3bd363bd8616661b27fdb48feb16a8f182abee9eeae85c4196b3e4b",
        "0a6d7ba0d0d77419aa62010dec8310ecccedcaef91c7117dbaab34ab17e34426",
        [-0.09771975129842758, 0.09771975129842758, -0.09771975129842758],
        [0.058099787682294846, 0.1695924699306488, 0.26734575629234314],
        "15feef9c84d4dab5",
    ),
}

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


# The same of A (64 x 40) and B (100 x 36): a rank above the sizes stacks blocks.
PINNED_BLOCKS = [
    "35350f6abb833381d74d30adca1ea8d7df85c115d3b55420c72e6d96dbd2949d",
    "02a5b6ef3d25b24bbfb2fd6494c503070499f687cf9dd90cebc8241cf7df9841",
]


def sha256(matrix: Tensor) -> str:
    return hashlib.sha256(matrix.contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@every_distribution
def test_values_are_pinned(distribution: str) -> None:
    A_digest, B_digest, row_of_A, column_of_B, fingerprint = PINNED[distribution]
    shared = SharedProjections(7, distribution)
    A, B = shared.A(24, 40), shared.B(24, 33)
    assert FORMAT_VERSION == 1
    assert A[1, :3].tolist() == row_of_A
    assert B[:3, 1].tolist() == column_of_B
    assert (sha256(A), sha256(B)) == (A_digest, B_digest)
    assert shared.fingerprint() == fingerprint


def test_stacked_blocks_are_pinned() -> None:
    shared = SharedProjections(7, "structured")
    assert [sha256(shared.A(64, 40)), sha256(shared.B(100, 36))] == PINNED_BLOCKS


@pytest.mark.parametrize(
    ("rows", "size", "factors"),
    [
        (256, 1024, (16, 16)),
        (1024, 1024, (32, 32)),
        (1024, 5632, (64, 16)),
        (7, 1024, (1, 7)),
        (100, 101, (1, 100)),
        (1, 1, (1, 1)),
        (101, 384, (7, 16)),
    ],
)
def test_factors_of_structured_matrices_are_pinned(rows: int, size: int, factors: tuple[int, int]) -> None:
    # Another choice is another matrix: a new format.
    assert factors_of_rows(rows, *factors_of_size(size)) == factors


@given(rank=st.integers(1, 70) | st.just(211), size=st.integers(1, 40) | st.sampled_from([64, 97]))
def test_structured_rows_are_orthogonal_within_blocks_of_the_size(rank: int, size: int) -> None:
    shared, f64 = SharedProjections(3, "structured"), torch.float64
    for rows, fan_in in ((shared.A(rank, size, f64), size), (shared.B(rank, size, f64).T, rank)):
        assert float(rows.square().mean()) == pytest.approx(2 / fan_in, rel=1e-12)
        for block in rows.split(size):
            assert worst_error(block @ block.T, 2 * size / fan_in * torch.eye(len(block), dtype=f64)) < 1e-12


def test_fingerprints_tell_seeds_and_distributions_apart() -> None:
    prints = {SharedProjections(seed, name).fingerprint() for seed in (0, 1, 2**64 - 1) for name in DISTRIBUTIONS}
    assert len(prints) == 3 * len(DISTRIBUTIONS)


@pytest.mark.parametrize(
    ("seed", "distribution", "error", "message"),
    [
        *((seed, "structured", TypeError, f"seed must be an integer, got {seed!r}") for seed in (True, 1.0, "1", None)),
        *((seed, "structured", ValueError, rf"seed must lie in .*, got {seed}") for seed in (-1, 2**64)),
        (0, "gaussian", ValueError, r"unknown distribution 'gaussian'.* kaiming_uniform, structured$"),
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
