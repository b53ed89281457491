"""How an update changes the norms of rows, from the terms of the norm, or from the rows where these cancel.

    n**2 = w**2 + 2 beta cross + beta**2 q

An update may be far larger than its row, and its square too large for the dtype, so the norm is held relative to the
larger of the two, k = max(w, |beta|):

    u = w / k,   b = beta / k,   h = n / k
    h**2 = u**2 + change,   change = 2 b cross / k + b**2 q

Dimensions: O out, I in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.annotations import Float
from ..ops.tracing import transforming

NEAR_CANCELLATION = 0.1
"""Below this share of its squared norm a row is measured densely: the sum of large terms lost its digits."""


class RowChange(NamedTuple):
    """The norms of updated rows; those of zero rows are as without an update."""

    k: Float[Tensor, "O"]
    """A constant: what is measured does not depend on the unit, so nor does its gradient."""
    u: Float[Tensor, "O"]
    """One for updates smaller than their rows."""
    b: Float[Tensor, "O"]
    change: Float[Tensor, "O"]
    """`h**2 - u**2`, whose digits are all there for small updates."""
    h: Float[Tensor, "O"]

    @property
    def ratio(self) -> Float[Tensor, "O"]:
        """`n / w`."""
        return self.h / self.u

    def measured(self, rows: Tensor, ratio: Float[Tensor, "N"]) -> "RowChange":
        """With `n / w` of some rows, by index, in place of what their terms say."""
        u = self.u[rows]
        h = (ratio * u).to(u.dtype)
        change = self.change.index_copy(0, rows, (h - u) * (h + u))
        return self._replace(change=change, h=self.h.index_copy(0, rows, h))


def row_change(
    w: Float[Tensor, "O"], cross: Float[Tensor, "O"], q: Float[Tensor, "O"], beta: Float[Tensor, "O"]
) -> RowChange:
    """The norms of updated rows from the terms of the norm."""
    live = w > 0
    w, beta = torch.where(live, w, 1.0), torch.where(live, beta, 0.0)
    k = torch.maximum(w, beta.abs()).detach()
    u, b = w / k, beta / k
    u2 = u.square()
    # Rounding can bring a squared norm below zero; the floor keeps the gain of a row that vanishes finite.
    change = torch.maximum(2 * b * (cross / k) + b.square() * q, -u2)
    floor = torch.finfo(w.dtype).eps ** 2 * u2 + torch.finfo(w.dtype).tiny
    return RowChange(k, u, b, change, torch.maximum(u2 + change, floor).sqrt())


def nearly_cancelled(change: RowChange) -> Tensor:
    """Which rows the update nearly cancels."""
    return change.h.square() < NEAR_CANCELLATION * change.u.square()


def indices_if_any(mask: Tensor) -> Tensor | None:
    """Indices of the marked rows; None without any, or where that cannot be asked cheaply."""
    if transforming() or mask.device.type != "cpu" or not mask.any():
        return None
    return mask.nonzero()[:, 0]


def measured_ratio(updated: Float[Tensor, "N I"], w: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """`n / w` of a few rows from V' itself, in its dtype; at least the precision of w."""
    ratio: Tensor = torch.linalg.vector_norm(updated, dim=1) / w
    return ratio.clamp_min(torch.finfo(w.dtype).eps)
