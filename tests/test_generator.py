"""Random values as a pure function of (seed, stream, row, column): pinned, and checked against Philox's definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvora import generator

ROWS = [generator.uniform_row, generator.gaussian_row]
WORD = 2**64 - 1


def philox(key: tuple[int, int], counter: int) -> list[int]:
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
    blocks = [philox((seed, stream), (row << 64) + block) for block in (1, 2)]
    assert generator.raw_row(seed, stream, row, 8).tolist() == blocks[0] + blocks[1]


def test_raw_values_are_pinned() -> None:
    assert generator.raw_row(seed=7, stream=1, row=5, count=5).tolist() == [
        0x7232E2C6FD3AA045,
        0xE86AA6B472CBFDBE,
        0x8F4581D4A981CA73,
        0x2BB6C882EFAB5E6F,
        0x6AB2A19999F7DA0,
    ]


def test_uniform_values_are_pinned() -> None:
    expected = [-0.10782212018966675, 0.8157547116279602, 0.11930865049362183, -0.6584843993186951]
    assert generator.uniform_row(7, 1, 5, 4).tolist() == expected


def test_gaussian_values_are_pinned() -> None:
    expected = [2.4655914306640625, 0.0458526611328125, 0.431640625, 3.0282745361328125]
    assert generator.gaussian_row(7, 1, 5, 4).tolist() == expected


def test_orthogonal_values_are_pinned() -> None:
    assert generator.orthogonal_rows(7, 1, 2, 4).tolist() == [
        [0.3511386811733246, -0.8610162734985352, 0.3546687364578247, -1.734809160232544],
        [0.993867814540863, -1.4677176475524902, -0.017006222158670425, 0.9261438250541687],
    ]


@pytest.mark.parametrize("make_row", ROWS)
@given(count=st.integers(1, 50), more=st.integers(1, 50))
def test_a_longer_row_starts_with_the_shorter(make_row, count: int, more: int) -> None:
    np.testing.assert_array_equal(make_row(1, 2, 3, count + more)[:count], make_row(1, 2, 3, count))


@pytest.mark.parametrize("make_row", ROWS)
@pytest.mark.parametrize("other", [(2, 2, 3), (1, 3, 3), (1, 2, 4)], ids=["seed", "stream", "row"])
def test_seed_stream_and_row_each_give_other_values(make_row, other: tuple[int, int, int]) -> None:
    assert not np.isin(make_row(1, 2, 3, 100), make_row(*other, 100)).any()


def test_uniform_values_lie_strictly_between_minus_one_and_one() -> None:
    values = generator.uniform_row(0, 0, 0, 2**20)
    assert values.dtype == np.float32
    assert -1 < values.min() < -0.9999
    assert 0.9999 < values.max() < 1
    assert not (values == 0).any()


def test_uniform_values_are_odd_multiples_of_a_power_of_two() -> None:
    multiples = generator.uniform_row(0, 0, 0, 1000).astype(np.float64) * 2**24
    assert (multiples % 2 == 1).all()


def test_uniform_values_have_mean_zero_and_variance_one_third() -> None:
    values = generator.uniform_row(0, 0, 0, 2**20).astype(np.float64)
    assert abs(values.mean()) < 0.003
    assert abs(values.var() - 1 / 3) < 0.002


def test_gaussian_values_have_the_moments_of_a_normal_distribution() -> None:
    values = generator.gaussian_row(0, 0, 0, 2**20).astype(np.float64)
    assert abs(values.mean()) < 0.005
    assert abs(values.var() - 1) < 0.01
    assert abs((values**3).mean()) < 0.02
    assert abs((values**4).mean() - 2.9) < 0.05  # 3 - 6 / (5 * 12) for a sum of twelve uniforms
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.005


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (7, 7), (20, 33), (64, 300)])
def test_orthogonal_rows_are_orthogonal_with_norm_root_of_the_columns(rows: int, columns: int) -> None:
    values = generator.orthogonal_rows(3, 0, rows, columns)
    assert values.dtype == np.float32
    gram = values.astype(np.float64) @ values.T
    np.testing.assert_allclose(gram, columns * np.eye(rows), atol=1e-6 * columns)


def test_orthogonal_rows_are_refused_beyond_the_columns() -> None:
    with pytest.raises(AssertionError):
        generator.orthogonal_rows(0, 0, 5, 4)
