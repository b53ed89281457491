"""Vectors in 8 bits: what rounding may cost, and that nothing is lost over the rounds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.eight_bits import BLOCK, EightBits, rounded


@given(st.integers(1, 3 * BLOCK), st.sampled_from([1e-45, 1e-40, 1e-8, 1.0, 1e30]), st.integers(0, 99))
def test_a_value_is_off_by_half_a_step_of_its_block(length: int, scale: float, seed: int) -> None:
    vector = scale * torch.randn(length, generator=torch.Generator().manual_seed(seed))
    sent = EightBits.of(vector)
    assert sent.values.dtype == torch.int8
    for block, back in zip(vector.split(BLOCK), sent.vector().split(BLOCK), strict=True):
        # Values below the smallest normal number become zero.
        assert (back - block).abs().max() <= block.abs().max() * (1 / 254 + 1e-6) + 1e-38


def test_a_vector_takes_a_quarter_of_its_bytes() -> None:
    vector = torch.randn(50_688)
    assert sum(part.nbytes for part in EightBits.of(vector)) < 0.255 * vector.nbytes


def test_what_rounding_leaves_is_sent_later() -> None:
    """Small changes beside a large one, which alone would be rounded to zero in every round."""
    change = torch.full((BLOCK,), 0.1)
    change[0] = 100.0
    received, alone, left = torch.zeros(BLOCK), torch.zeros(BLOCK), torch.zeros(BLOCK)
    for _ in range(50):
        sent, left = rounded(change, left)
        received += sent.vector()
        alone += EightBits.of(change).vector()
    assert (alone[1:] == 0).all()
    torch.testing.assert_close(received + left, 50 * change, rtol=1e-5, atol=1e-3)
    assert left.abs().max() <= 101 / 254
