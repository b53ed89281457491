"""How an update changes the norms of rows, from the terms of the norm, or from the rows where these cancel.

    eps = n**2 / w**2 - 1 = (2 beta cross + beta**2 q) / w**2,   s = n / w

Dimensions: O out, I in.
"""

import torch
from torch import Tensor

from .shapes import Float
from .transforms import transforming

NEAR_CANCELLATION = -0.9
"""Below this relative change of its squared norm a row is measured densely: the sum of large terms lost its digits."""


def norm_change(
    w: Float[Tensor, "O"], cross: Float[Tensor, "O"], q: Float[Tensor, "O"], beta: Float[Tensor, "O"]
) -> tuple[Float[Tensor, "O"], Float[Tensor, "O"]]:
    """`eps = n**2 / w**2 - 1` and `s = n / w` from the terms of the norm."""
    live = w > 0
    eps = torch.where(live, (2 * beta * cross + beta.square() * q) / torch.where(live, w.square(), 1.0), 0.0)
    # Rounding can bring a squared norm below zero; the floor keeps the gain of a row that vanishes finite.
    eps = eps.clamp_min(-1)
    return eps, (1 + eps).clamp_min(torch.finfo(w.dtype).eps ** 2).sqrt()


def nearly_cancelled(eps: Float[Tensor, "O"]) -> Tensor | None:
    """Indices of the rows that the update nearly cancels; None without any, or where that cannot be asked cheaply."""
    near = None if transforming() or eps.device.type != "cpu" else eps < NEAR_CANCELLATION
    return near.nonzero()[:, 0] if near is not None and near.any() else None


def measured_change(updated: Float[Tensor, "N I"], w: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """`s` of a few rows from V' itself, in its dtype; at least the precision of w."""
    s: Tensor = torch.linalg.vector_norm(updated, dim=1) / w
    return s.clamp_min(torch.finfo(w.dtype).eps)
