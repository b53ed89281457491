"""Probes of base weights: what a configuration keeps to recognise the base model that its adapter was made for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from ...matrices.philox import uniform_row
from ...ops.annotations import Float

BASE_TOLERANCE = 0.3
"""Largest distance of the probes of a weight to those of the weight that an adapter was trained on.

The probes of an unrelated weight lie about 1.4 away. Casts to half precision move them by 0.002, eight bits by
0.006, four bits by 0.1."""
NORM_TOLERANCE = 0.05
"""Largest relative difference of the weights' norms."""
CHANGE_TOLD = 0.02
"""Distance from which on a base that is accepted is told of: far above casts and eight bits, below four bits."""

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
    return (
        abs(probes[0] - expected[0]) <= NORM_TOLERANCE * expected[0]
        and math.dist(probes[1:], expected[1:]) <= BASE_TOLERANCE * math.sqrt(_PROBES) * expected[0]
    )


def change(probes: list[float], expected: list[float]) -> float:
    """About how far apart the weights of two lists of probes are, relative to the second's norm."""
    distance = math.dist(probes[1:], expected[1:]) / math.sqrt(_PROBES)
    return max(distance, abs(probes[0] - expected[0])) / (expected[0] or 1.0)


def warn_of_changes(changes: Mapping[str, float], stacklevel: int = 2) -> None:
    """Say how far a base is from the one that an adapter was made for, if that is more than a cast to half precision.

    Args:
        changes: of each adapted weight, as `change` gives them.
        stacklevel: as of `warnings.warn`.

    Warns:
        UserWarning: some weights are another quantisation's, or were trained a little.
    """
    changed = {name: size for name, size in changes.items() if size > CHANGE_TOLD}
    if changed:
        most = max(changed, key=lambda name: changed[name])
        warnings.warn(
            f"the base is not quite the one that the adapter was made for: {len(changed)} of {len(changes)} adapted "
            f"weights differ, {most} by about {changed[most]:.0%} of its norm, as another quantisation (or a little "
            "training) makes them. The adapter is loaded all the same; its outputs will differ accordingly",
            stacklevel=stacklevel + 1,
        )
