"""Random values as a pure function of (seed, stream, row, column): pinned, and checked against Philox's definition."""

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


@given(count=st.integers(1, 50), more=st.integers(1, 50))
def test_a_longer_row_starts_with_the_shorter(count: int, more: int) -> None:
    np.testing.assert_array_equal(philox.uniform_row(1, 2, 3, count + more)[:count], philox.uniform_row(1, 2, 3, count))


def test_uniform_values_are_odd_multiples_of_a_power_of_two_strictly_between_minus_one_and_one() -> None:
    values = philox.uniform_row(0, 0, 0, 2**20)
    assert values.dtype == np.float32
    assert -1 < values.min() < -0.9999
    assert 0.9999 < values.max() < 1
    values = values.astype(np.float64)
    assert (values * 2**24 % 2 == 1).all()
    assert abs(values.mean()) < 0.003
    assert abs(values.var() - 1 / 3) < 0.002
