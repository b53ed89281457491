"""How far a weight was moved, as pure functions of the weight before and after.

    dM = mean |m' - m| / m,   dD = mean (1 - cos(row of W', row of W))       m, m' norms of the rows

after figure 2 of the DoRA paper (arXiv 2402.09353), whose columns are our rows; its magnitudes are not divided by m.

Dimensions: O out, I in.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...tensors import Float

LARGEST = 1024
"""Sizes up to which all singular values are computed."""
SOME = 64
"""How many of them beyond that."""


class Change(NamedTuple):
    """How far a weight was moved, in shares of what it was.

    Args:
        magnitude: dM, the mean relative change of the norms of rows.
        growth: the mean of m' / m - 1, with its sign.
        direction: dD, the mean of one minus the cosine of each row with itself.
        degrees: the mean angle between each row and itself.
        size: ||W' - W|| / ||W||, Frobenius.
    """

    magnitude: float
    growth: float
    direction: float
    degrees: float
    size: float


class Spectrum(NamedTuple):
    """Singular values of an update.

    Args:
        values: the largest ones, as shares of the largest singular value of the weight.
        effective_rank: exp of the entropy of the squares' shares (Roy and Vetterli, 2007).
        complete: whether all were computed.
    """

    values: tuple[float, ...]
    effective_rank: float
    complete: bool


@torch.no_grad()
def change(weight: Float[Tensor, "O I"], moved: Float[Tensor, "O I"]) -> Change:
    """How far a weight was moved; rows of zeros count as unmoved.

    Args:
        weight: before, in float64.
        moved: after.
    """
    before, after = weight.norm(dim=1), moved.norm(dim=1)
    live = before > 0
    ratio = torch.where(live, after / before.clamp_min(1e-300), 1.0)
    # Distance of unit rows: the cosine has no digits left for small angles.
    gap = (weight / before.clamp_min(1e-300)[:, None] - moved / after.clamp_min(1e-300)[:, None]).norm(dim=1)
    half = torch.where(live & (after > 0), gap / 2, 0.0).clamp_max(1.0)
    size = (moved - weight).norm() / weight.norm().clamp_min(1e-300)
    return Change(
        magnitude=float((ratio - 1).abs().mean()),
        growth=float((ratio - 1).mean()),
        direction=float((2 * half.square()).mean()),
        degrees=float(torch.rad2deg(2 * torch.asin(half)).mean()),
        size=float(size),
    )


@torch.no_grad()
def spectrum(weight: Float[Tensor, "O I"], update: Float[Tensor, "O I"]) -> Spectrum:
    """The singular values of an update; of large matrices the largest ones, by a seeded subspace iteration.

    Args:
        weight: that it is added to.
        update: W' - W.
    """
    complete = min(update.shape) <= LARGEST
    values = torch.linalg.svdvals(update) if complete else _largest(update, SOME)
    scale = float(_largest(weight, 4)[0])
    shares = values.square() / values.square().sum().clamp_min(1e-300)
    entropy = float(-(shares * shares.clamp_min(1e-300).log()).sum())
    largest = values[:SOME] / (scale or 1.0)
    return Spectrum(tuple(map(float, largest)), math.exp(entropy) if bool(values.any()) else 0.0, complete)


def means(changes: Sequence[Change]) -> dict[str, float]:
    """Mean changes over layers: shares in percent, the angle in degrees."""
    names = {"magnitude": "magnitude, %", "growth": "growth, %", "degrees": "angle, degrees", "size": "size, %"}
    return {
        label: (1 if name == "degrees" else 100) * sum(getattr(layer, name) for layer in changes) / len(changes)
        for name, label in names.items()
    }


@torch.no_grad()
def products(updates: list[Float[Tensor, "O I"]]) -> Float[Tensor, "N N"]:
    """Inner products of updates, of which cosines are made."""
    flat = torch.stack([update.flatten() for update in updates])
    return flat @ flat.T


def cosines(inner: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """Cosines from inner products; zero where an update is."""
    norms = inner.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms.clamp_min(1e-300), 0.0)
    return torch.clamp(inner * scale[:, None] * scale, -1, 1)


def _largest(matrix: Float[Tensor, "O I"], count: int) -> Float[Tensor, "K"]:
    """The largest singular values."""
    count = min(count, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], min(count + 8, matrix.shape[1]), generator=generator, dtype=torch.float64)
    basis = matrix @ start.to(matrix.device)
    for _ in range(4):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(basis).Q.T @ matrix)
    return values[:count]
