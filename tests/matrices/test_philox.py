"""Random values as a pure function of (seed, stream, row, column): pinned, and checked against Philox's definition."""

import hashlib
from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dvora.matrices import philox

WORD = 2**64 - 1


def philox_in_integers(key: tuple[int, int], counter: int) -> list[int]:
    """Philox 4x64-10 of Salmon et al. 2011 in plain integers: the four values of one counter."""
    c = [counter >> 64 * i & WORD for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [right >> 64 ^ c[1] ^ k0, right & WORD, left >> 64 ^ c[3] ^ k1, left & WORD]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & WORD, k1 + 0xBB67AE8584CAA73B & WORD
    return c


@given(seed=st.integers(0, WORD), stream=st.integers(0, WORD), row=st.integers(0, WORD))
def test_raw_values_are_philox(seed: int, stream: int, row: int) -> None:
    # NumPy counts up before each block of four.
    blocks = [philox_in_integers((seed, stream), (row << 64) + block) for block in (1, 2)]
    assert philox.raw_row(seed, stream, row, 8).tolist() == blocks[0] + blocks[1]


def test_values_are_pinned() -> None:
    assert philox.raw_row(seed=7, stream=1, row=5, count=3).tolist() == [
        0x7232E2C6FD3AA045,
        0xE86AA6B472CBFDBE,
        0x8F4581D4A981CA73,
    ]
    expected = [-0.10782212018966675, 0.8157547116279602, 0.11930865049362183, -0.6584843993186951]
    assert philox.uniform_row(7, 1, 5, 4).tolist() == expected
    assert philox.sign_row(7, 1, 5, 6).tolist() == [1, -1, -1, 1, 1, -1]
    assert philox.permutation_row(7, 1, 5, 8).tolist() == [4, 7, 3, 0, 6, 2, 1, 5]


@given(kind=st.sampled_from([philox.uniform_row, philox.sign_row]), count=st.integers(1, 50), more=st.integers(1, 50))
def test_a_longer_row_starts_with_the_shorter(kind: Callable[..., np.ndarray], count: int, more: int) -> None:
    np.testing.assert_array_equal(kind(1, 2, 3, count + more)[:count], kind(1, 2, 3, count))


def test_uniform_values_are_odd_multiples_of_a_power_of_two_strictly_between_minus_one_and_one() -> None:
    values = philox.uniform_row(0, 0, 0, 2**20)
    assert values.dtype == np.float32
    assert -1 < values.min() < -0.9999
    assert 0.9999 < values.max() < 1
    values = values.astype(np.float64)
    assert (values * 2**24 % 2 == 1).all()
    assert abs(values.mean()) < 0.003
    assert abs(values.var() - 1 / 3) < 0.002


@given(seed=st.integers(0, WORD), count=st.integers(1, 200))
def test_a_permutation_sorts_the_raw_values(seed: int, count: int) -> None:
    order = philox.permutation_row(seed, 2, 3, count)
    assert sorted(order.tolist()) == list(range(count))
    raw = philox.raw_row(seed, 2, 3, count)[order].tolist()
    assert raw == sorted(raw)


@given(size=st.integers(1, 120))
def test_rows_of_cosines_are_orthonormal(size: int) -> None:
    rows = philox.cosine_rows(np.arange(size), size)
    np.testing.assert_allclose(rows @ rows.T, np.eye(size), atol=1e-13)
    np.testing.assert_array_equal(philox.cosine_rows(np.array([size - 1, 0]), size), rows[[size - 1, 0]])


def test_rows_of_cosines_are_pinned() -> None:
    # Every bit: a library that fused a multiplication and an addition would change some.
    rows = [philox.cosine_rows(np.arange(size), size) for size in (32, 44, 97)]
    digest = hashlib.sha256(b"".join(row.astype("<f8").tobytes() for row in rows)).hexdigest()
    assert digest == "6e6da48250d73b682f0d2640c7489bfc2f6f4e53dc6bfd0b4212acd12b569e17"
    assert philox.cosine_rows(np.array([3]), 5)[0, :2].tolist() == [0.3717480344601845, -0.6015009550075456]
