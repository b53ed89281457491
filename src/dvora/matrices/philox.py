"""Random values that are a pure function of (seed, stream, row, column), bit for bit the same on every machine.

Counter-based (Philox 4x64), from NumPy's raw stream, which NumPy guarantees to be stable. What follows are integer
operations and single IEEE additions, multiplications, divisions and square roots, so no CPU, thread count or library
version changes a bit. Longer rows and further rows leave existing values as they are.
"""

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
