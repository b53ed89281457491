"""What tells one base model from another: a few numbers of every adapted weight."""

import math
import warnings
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..matrices.philox import uniform_row
from ..tensors import Float

BASE_TOLERANCE = 0.3
"""Largest distance of a weight's fingerprint from that of the weight that an adapter was trained on.

Unrelated weights are about 1.4 apart. Casts to half precision move them by 0.002, eight bits by
0.006, four bits by 0.1."""
NORM_TOLERANCE = 0.05
"""Largest relative difference of the weights' norms."""
CHANGE_WARNED = 0.02
"""Distance above which an accepted base gives a warning: far above casts and eight bits, below four bits."""

_SEED, _ROW_STREAM, _COLUMN_STREAM = 0, 2**33, 2**33 + 1
_PROBES = 8


@torch.no_grad()
def fingerprint_of(matrix: Float[Tensor, "O I"], norms: Float[Tensor, "O"]) -> list[float]:
    """The norm of W, from those of its rows, and eight products `u^T W v` with random vectors, each of its size."""
    u = uniform_rows(_ROW_STREAM, _PROBES, len(matrix)).to(norms)
    v = uniform_rows(_COLUMN_STREAM, _PROBES, matrix.shape[1]).to(norms)
    products = 3 * ((u @ matrix.to(u.dtype)) * v).sum(1)
    return [float(f"{value:.4g}") for value in (float(norms.norm()), *products.tolist())]


def alike(fingerprint: list[float], expected: list[float]) -> bool:
    """Whether two fingerprints can be of one weight, cast or quantised."""
    return (
        len(fingerprint) == len(expected)
        and abs(fingerprint[0] - expected[0]) <= NORM_TOLERANCE * expected[0]
        and math.dist(fingerprint[1:], expected[1:]) <= BASE_TOLERANCE * math.sqrt(_PROBES) * expected[0]
    )


def change(fingerprint: list[float], expected: list[float]) -> float:
    """About how far apart two weights are by their fingerprints, relative to the norm of the second."""
    distance = math.dist(fingerprint[1:], expected[1:]) / math.sqrt(_PROBES)
    return max(distance, abs(fingerprint[0] - expected[0])) / (expected[0] or 1.0)


def warn_of_changes(changes: Mapping[str, float], stacklevel: int = 2) -> None:
    """Warn how far a base is from the one that an adapter was trained on, if that is more than a cast explains.

    `changes` are those of each adapted weight, by `change`.
    """
    changed = {name: size for name, size in changes.items() if size > CHANGE_WARNED}
    if changed:
        most = max(changed, key=lambda name: changed[name])
        warnings.warn(
            f"the base is not exactly the one that the adapter was made for: {len(changed)} of {len(changes)} adapted "
            f"weights differ, {most} by about {changed[most]:.0%} of its norm, as after another "
            "quantisation or a little training. The adapter is loaded; its outputs will differ accordingly",
            stacklevel=stacklevel + 1,
        )


@lru_cache(maxsize=16)
def uniform_rows(stream: int, count: int, size: int) -> Float[Tensor, "N I"]:
    """Rows of a stream of uniform values, the same on every machine; nobody writes to them."""
    return torch.from_numpy(np.stack([uniform_row(_SEED, stream, row, size) for row in range(count)]))
