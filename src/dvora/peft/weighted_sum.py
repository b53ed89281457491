"""A weighted sum of adapters of one weight as one adapter: exactly, or an error.

A sum of updates `W'_i - W` is one DVoRA update only if its low-rank parts share lambda_d up to a factor: with

    c = sum_i s_i (g_i - 1)        b = sum_i s_i g_i beta_i k_i        lambda_d_i = k_i lambda_d

it is `W' - W` of the adapter with `g = 1 + c`, `beta = b / g` and `m = g n`. Anything else has a higher rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from ..factors import Source, factors_of
from ..functional import Vectors
from ..tensors import Float
from ..weight import AdaptedWeight

TOLERANCE = 1e-5
"""Relative distance below which two lambda_d are the same up to a factor."""
SMALLEST_GAIN = 1e-2
"""Float32 gains have an absolute precision of 6e-8, so rows with smaller gains would lose their direction."""


class WeightedAdapter(NamedTuple):
    """One adapter of a weight, and its weight in the sum."""

    share: Tensor
    """s, a tensor without dimensions."""
    vectors: Vectors
    adapted: AdaptedWeight


def interpolated(a: Vectors, b: Vectors, t: float) -> Vectors:
    """Vectors on the straight line from `a` (t = 0, exactly) to `b` (t = 1, exactly)."""
    return Vectors(*(torch.lerp(x, y, t) for x, y in zip(a, b, strict=True)))


@torch.no_grad()
def weighted_sum(parts: Sequence[WeightedAdapter], weight: Tensor | None, into: AdaptedWeight) -> Vectors:
    """The vectors of the one adapter whose update is the sum of the parts', up to rounding.

    Args:
        parts: adapters of one weight with the same projections.
        weight: as stored, or None where there are only constants.
        into: the frozen side of the adapter to make, for the same projections.

    Raises:
        ValueError: no adapter has that update; the message says why.
    """
    if weight is not None:
        into.refresh_if_stale(weight)
    directions = [part.vectors.lambda_d for part in parts if _turns(part)]
    lambda_d = max(directions, key=lambda d: float(d.norm())) if directions else into.initial_vectors(0.1).lambda_d
    if len(lambda_d) != into.rank:
        raise ValueError(f"{into.name}: an update of rank {len(lambda_d)} does not fit an adapter of rank {into.rank}")
    c, b = torch.zeros_like(into.w), torch.zeros_like(into.w)
    for share, vectors, adapted in parts:
        factors = factors_of(Source(adapted, vectors), weight)
        c = c + share * factors.gain_minus_one
        if _turns(WeightedAdapter(share, vectors, adapted)):
            b = b + share * factors.scale * _factor(vectors.lambda_d, lambda_d, into.name)
    return _vectors_of(1 + c, b, lambda_d, weight, into)


def _turns(part: WeightedAdapter) -> bool:
    """Whether the adapter changes the direction of any row."""
    return bool(part.share != 0 and part.vectors.lambda_b.any() and part.vectors.lambda_d.any())


def _factor(lambda_d: Float[Tensor, "R"], of: Float[Tensor, "R"], name: str) -> Tensor:
    if lambda_d.shape != of.shape:
        raise ValueError(f"{name}: updates of ranks {len(lambda_d)} and {len(of)} differ in scale")
    factor = (lambda_d @ of) / (of @ of)
    if (lambda_d - factor * of).norm() > TOLERANCE * lambda_d.norm():
        raise ValueError(
            f"{name}: the adapters have different lambda_d, so the sum of their updates has a higher rank than one "
            "adapter can have"
        )
    return factor


def _vectors_of(
    g: Float[Tensor, "O"],
    b: Float[Tensor, "O"],
    lambda_d: Float[Tensor, "R"],
    weight: Tensor | None,
    into: AdaptedWeight,
) -> Vectors:
    """The adapter with gain g whose update is b B diag(lambda_d) A."""
    w = into.w
    # kappa, and so beta / w, of a lambda_b of one.
    scale = F.relative_scale(torch.ones_like(w), w, into.scaling, into.direction)
    moved = (b != 0) & (w > 0)
    if (moved & ((g.abs() < SMALLEST_GAIN) | (scale == 0))).any():
        raise ValueError(f"{into.name}: some row of the sum has no gain that one adapter could express it with")
    kappa = torch.where(moved, b / torch.where(moved, g * w, 1.0), 0.0)
    lambda_b = torch.where(moved, kappa / torch.where(moved, scale, 1.0), 0.0)
    if into.direction == "weight" and into.rank:
        # A zero row of W has g = 1 and beta = c lambda_b.
        lambda_b = torch.where(w > 0, lambda_b, b / into.scaling)
    # Of a magnitude of w the gain is w / n.
    of_w = factors_of(Source(into, Vectors(w, lambda_b, lambda_d)), weight).gain
    assert of_w is not None
    return Vectors(g * w / of_w, lambda_b, lambda_d.clone())
