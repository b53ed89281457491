"""Random values that are a pure function of (seed, stream, row, column), bit for bit the same on every machine.

Counter-based (Philox 4x64), from NumPy's raw stream, which NumPy guarantees to be stable. What follows are integer
operations and single IEEE additions, multiplications, divisions and square roots, so no CPU, thread count or library
version changes a bit. Longer rows and further rows leave existing values as they are.
"""

import math

import numpy as np
from numpy.typing import NDArray


def raw_row(seed: int, stream: int, row: int, count: int) -> NDArray[np.uint64]:
    """The first `count` raw 64-bit values of one row of one stream."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, row, 0, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniform_row(seed: int, stream: int, row: int, count: int) -> NDArray[np.float32]:
    """`count` values, uniform on (-1, 1): odd multiples of 2**-24, so exact in float32 and symmetric about zero."""
    bits = (raw_row(seed, stream, row, count) >> np.uint64(40)).astype(np.int32)
    values: NDArray[np.float32] = (2 * bits + (1 - 2**24)).astype(np.float32) * np.float32(2.0**-24)
    return values


def sign_row(seed: int, stream: int, row: int, count: int) -> NDArray[np.float64]:
    """`count` random signs, +1 or -1: the highest bit of each raw value."""
    bits = (raw_row(seed, stream, row, count) >> np.uint64(63)).astype(np.float64)
    values: NDArray[np.float64] = 1 - 2 * bits
    return values


def permutation_row(seed: int, stream: int, row: int, count: int) -> NDArray[np.int64]:
    """A random order of 0 .. count - 1: the indices sorted by their raw values, equal values by index."""
    order: NDArray[np.int64] = np.argsort(raw_row(seed, stream, row, count), kind="stable")
    return order


def cosine_rows(frequencies: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Rows of the orthonormal DCT-II matrix of a size, by frequency: (frequencies, size).

    Row k is cos(pi k (2 i + 1) / (2 size)) times sqrt(2 / size), or times sqrt(1 / size) for k = 0.
    """
    angle = np.outer(frequencies, 2 * np.arange(size) + 1)
    scale = np.sqrt(np.where(frequencies == 0, 1.0, 2.0) / size)
    values: NDArray[np.float64] = _cosine(angle, size) * scale[:, None]
    return values


def _cosine(numerator: NDArray[np.int64], quarter: int) -> NDArray[np.float64]:
    """cos(pi numerator / (2 quarter)), within 1e-15, since the C library's cosine differs between machines.

    Integer arithmetic reduces the angle to the first octant, where truncating the Taylor series is below rounding.
    """
    turn = numerator % (4 * quarter)
    half = np.minimum(turn, 4 * quarter - turn)
    first = np.minimum(half, 2 * quarter - half)
    use_sine = 2 * first > quarter
    octant = np.where(use_sine, quarter - first, first)
    angle = octant.astype(np.float64) / quarter * (math.pi / 2)
    square = angle * angle
    cosine, sine = np.zeros_like(square), np.zeros_like(square)
    for order in range(8, -1, -1):
        cosine = cosine * square + (-1.0) ** order / math.factorial(2 * order)
        sine = sine * square + (-1.0) ** order / math.factorial(2 * order + 1)
    values: NDArray[np.float64] = np.where(half > quarter, -1.0, 1.0) * np.where(use_sine, sine * angle, cosine)
    return values
