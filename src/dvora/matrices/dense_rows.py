"""The values of the dense kinds of A and B, unscaled, as pure functions of seed, stream, row and column."""

from collections.abc import Callable

import numpy as np

from . import philox

ENTRY_VARIANCE = {"kaiming_uniform": 1 / 3, "gaussian": 1.0, "rademacher": 1.0, "orthogonal": 1.0}
"""Of the unscaled values, by distribution."""

_ROW: dict[str, Callable[[int, int, int, int], np.ndarray]] = {
    "kaiming_uniform": philox.uniform_row,
    "gaussian": philox.gaussian_row,
    "rademacher": philox.sign_row,
}


def unit_rows(seed: int, distribution: str, stream: int, rows: int, columns: int) -> np.ndarray:
    """The unscaled values (rows, columns), float32. Orthogonal rows beyond the columns start independent blocks."""
    if distribution != "orthogonal":
        make = _ROW[distribution]
        return np.stack([make(seed, stream, row, columns) for row in range(rows)]).astype(np.float32)
    blocks = [
        # Each block draws from a stream of its own: rows of one stream belong to one Gram-Schmidt.
        philox.orthogonal_rows(seed, stream + 2 * (start // columns), min(columns, rows - start), columns)
        for start in range(0, rows, columns)
    ]
    return np.concatenate(blocks)
