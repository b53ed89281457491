"""Rows whose norm is small beside their bias, where "output of the base minus bias" has lost what the row gives.

The output of the base is rounded to the digits of its bias, and rescaling magnifies that error by g, which is large
where the magnitude of a tiny row is trained. With `y_b = x W^T + bias`

    y = y_b + (g - 1) (y_b - bias) + update             of other rows
    y = y_b + (g - 1) (x W^T)      + update             of these

Where the weight is not at hand in a pass (a quantised layer's) these rows keep the outputs of the base.

Dimensions: T tokens, O out, N small rows.
"""

from typing import NamedTuple

from torch import Tensor

from ..ops.annotations import Float
from .functional import RowFactors

SHARE = 1e-2
"""Of its bias, below which the norm of a row is small."""


class SmallRows(NamedTuple):
    """The small rows of one layer in one pass."""

    rows: Tensor
    """(N,)."""
    products: Float[Tensor, "*T N"] | None
    """Of the layer's inputs with these rows of the weight; None where that is not at hand."""

    def left_out(self, factors: RowFactors) -> RowFactors:
        """The factors with which these rows keep the base's outputs, but for their update where it can be added."""
        if self.products is None:
            factors = factors._replace(scale=factors.scale.index_fill(0, self.rows, 0.0))
        return factors._replace(
            gain_minus_one=factors.gain_minus_one.index_fill(0, self.rows, 0.0),
            gain=factors.gain.index_fill(0, self.rows, 1.0),
        )

    def added(self, outputs: Float[Tensor, "*T O"], factors: RowFactors) -> Float[Tensor, "*T O"]:
        """Outputs made with the factors of `left_out`, with what was left out."""
        if self.products is None:
            return outputs
        missing = factors.gain_minus_one[self.rows] * self.products
        return outputs.index_add(-1, self.rows, missing.to(outputs.dtype))


def small_rows(w: Float[Tensor, "O"], bias: Float[Tensor, "O"]) -> Tensor | None:
    """Indices of the rows whose norm is small beside their bias; None without any. Rows of zeros are never rescaled."""
    small = (w > 0) & (w < SHARE * bias.detach().abs().to(w.dtype))
    return small.nonzero()[:, 0] if small.any() else None
