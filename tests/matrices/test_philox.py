"""Random values as a pure function of (seed, stream, row, column): pinned, and checked against Philox's definition."""

import hashlib
from decimal import Decimal, localcontext

import numpy as np
import pytest
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


def test_raw_values_are_pinned() -> None:
    assert philox.raw_row(seed=7, stream=1, row=5, count=5).tolist() == [
        0x7232E2C6FD3AA045,
        0xE86AA6B472CBFDBE,
        0x8F4581D4A981CA73,
        0x2BB6C882EFAB5E6F,
        0x6AB2A19999F7DA0,
    ]


def test_uniform_values_are_pinned() -> None:
    expected = [-0.10782212018966675, 0.8157547116279602, 0.11930865049362183, -0.6584843993186951]
    assert philox.uniform_row(7, 1, 5, 4).tolist() == expected


@given(count=st.integers(1, 50), more=st.integers(1, 50))
def test_a_longer_row_starts_with_the_shorter(count: int, more: int) -> None:
    np.testing.assert_array_equal(philox.uniform_row(1, 2, 3, count + more)[:count], philox.uniform_row(1, 2, 3, count))


@pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4)], ids=["seed", "stream", "row"])
def test_seed_stream_and_row_each_give_other_values(other: tuple[int, int, int]) -> None:
    assert not np.isin(philox.uniform_row(1, 2, 3, 100), philox.uniform_row(*other, 100)).any()


def test_uniform_values_are_odd_multiples_of_a_power_of_two_strictly_between_minus_one_and_one() -> None:
    values = philox.uniform_row(0, 0, 0, 2**20)
    assert values.dtype == np.float32
    assert -1 < values.min() < -0.9999
    assert 0.9999 < values.max() < 1
    values = values.astype(np.float64)
    assert (values * 2**24 % 2 == 1).all()
    assert abs(values.mean()) < 0.003
    assert abs(values.var() - 1 / 3) < 0.002


@given(seed=st.integers(0, WORD), count=st.integers(1, 50), more=st.integers(1, 50))
def test_signs_are_plus_and_minus_one_and_a_longer_row_starts_with_the_shorter(
    seed: int, count: int, more: int
) -> None:
    signs = philox.sign_row(seed, 2, 3, count + more)
    assert set(signs) <= {-1.0, 1.0}
    np.testing.assert_array_equal(signs[:count], philox.sign_row(seed, 2, 3, count))


def test_signs_are_pinned_and_balanced() -> None:
    assert philox.sign_row(7, 1, 5, 6).tolist() == [1, -1, -1, 1, 1, -1]
    assert abs(philox.sign_row(0, 0, 0, 2**16).mean()) < 0.01


@given(seed=st.integers(0, WORD), count=st.integers(1, 200))
def test_a_permutation_sorts_the_raw_values(seed: int, count: int) -> None:
    order = philox.permutation_row(seed, 2, 3, count)
    assert sorted(order.tolist()) == list(range(count))
    raw = philox.raw_row(seed, 2, 3, count)[order].tolist()
    assert raw == sorted(raw)


def test_permutations_are_pinned() -> None:
    assert philox.permutation_row(7, 1, 5, 8).tolist() == [4, 7, 3, 0, 6, 2, 1, 5]


def exact_cosine(numerator: int, quarter: int) -> float:
    """cos(pi numerator / (2 quarter)) from its series in forty digits."""
    with localcontext() as context:
        context.prec = 40
        pi = Decimal("3.141592653589793238462643383279502884197")
        angle = pi * (numerator % (4 * quarter)) / (2 * quarter)
        term = total = Decimal(1)
        for order in range(1, 30):
            term *= -angle * angle / ((2 * order - 1) * 2 * order)
            total += term
        return float(total)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 88, 101])
def test_cosines_are_those_of_the_mathematics(size: int) -> None:
    angle = np.arange(-4 * size, 8 * size + 1)
    expected = [exact_cosine(numerator, size) for numerator in angle.tolist()]
    np.testing.assert_allclose(philox._cosine(angle, size), expected, rtol=0, atol=3e-16)


def test_cosines_of_whole_quarters_are_exact() -> None:
    np.testing.assert_array_equal(philox._cosine(np.arange(-4, 9), 1), [1, 0, -1, 0] * 3 + [1])


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
