"""Probes of base weights: what a configuration keeps to recognise the base model that its adapter was made for."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..generator import uniform_row
from ..shapes import Float

BASE_TOLERANCE = 0.3
"""Largest distance of the probes of a weight to those of the weight that an adapter was trained on.

The probes of an unrelated weight lie about 1.4 away. Casts to half precision move them by 0.002, eight bits by
0.006, four bits by 0.1."""
NORM_TOLERANCE = 0.05
"""Largest relative difference of the weights' norms."""

_PROBES, _PROBE_SEED, _ROW_STREAM, _COLUMN_STREAM = 8, 0, 2**33, 2**33 + 1


@torch.no_grad()
def probes_of(matrix: Float[torch.Tensor, "O I"], norms: Float[torch.Tensor, "O"]) -> list[float]:
    """The norm of W, and products `u^T W v` with random vectors: of the norm's size, and other for another W.

    Args:
        matrix: W.
        norms: of its rows.
    """
    u, v = (
        torch.from_numpy(np.stack([uniform_row(_PROBE_SEED, stream, k, size) for k in range(_PROBES)])).to(norms)
        for stream, size in zip((_ROW_STREAM, _COLUMN_STREAM), matrix.shape, strict=True)
    )
    products = 3 * ((u @ matrix.to(u.dtype)) * v).sum(1)
    return [float(f"{value:.4g}") for value in (float(norms.norm()), *products.tolist())]


def alike(probes: list[float], expected: list[float]) -> bool:
    """Whether two lists of probes can be of one weight, cast or quantised."""
    if len(probes) != len(expected):
        return False
    (norm, *products), (expected_norm, *expected_products) = probes, expected
    distance = math.dist(products, expected_products) / math.sqrt(_PROBES)
    return abs(norm - expected_norm) <= NORM_TOLERANCE * expected_norm and distance <= BASE_TOLERANCE * expected_norm
