"""Rows whose norm is small beside their bias: for them, subtracting the bias from the base's output cancels.

The base's output is rounded to the precision of its bias, and rescaling multiplies that error by g, which is large
where the magnitude of a tiny row is trained. So, with `y_b = x W^T + bias`:

    y = y_b + (g - 1) (y_b - bias) + update             for other rows
    y = y_b + (g - 1) (x W^T)      + update             for these

Where the weight is not in memory (a quantised layer's) these rows keep the outputs of the base.

Dimensions: T tokens, O out, N small rows.
"""

from typing import NamedTuple

from torch import Tensor

from ..ops.annotations import Float
from .functional import RowFactors

SHARE = 1e-2
"""A row is small if its norm is below this share of its bias."""


class SmallRows(NamedTuple):
    """The small rows of one layer in one pass."""

    rows: Tensor
    """(N,)."""
    products: Float[Tensor, "*T N"] | None
    """The products of the layer's inputs with these rows; None where the weight is not in memory."""

    def left_out(self, factors: RowFactors) -> RowFactors:
        """Factors that leave these rows as the base has them, plus their update where `added` completes them."""
        if self.products is None:
            factors = factors._replace(scale=factors.scale.index_fill(-1, self.rows, 0.0))
        return factors._replace(
            gain_minus_one=factors.gain_minus_one.index_fill(-1, self.rows, 0.0),
            gain=factors.gain.index_fill(-1, self.rows, 1.0),
        )

    def added(self, outputs: Float[Tensor, "*T O"], factors: RowFactors) -> Float[Tensor, "*T O"]:
        """Outputs computed with the factors of `left_out`, plus what was left out."""
        if self.products is None:
            return outputs
        missing = factors.gain_minus_one[..., self.rows] * self.products
        return outputs.index_add(-1, self.rows, missing.to(outputs.dtype))


def small_rows(w: Float[Tensor, "O"], bias: Float[Tensor, "O"]) -> Tensor | None:
    """Indices of the rows whose norm is small beside their bias; None without any. Zero rows are not among them."""
    small = (w > 0) & (w < SHARE * bias.detach().abs().to(w.dtype))
    return small.nonzero()[:, 0] if small.any() else None
