"""What adapters of LoRA do in a linear layer, `y + B (A x)`, for rows of a batch, each with factors of its own.

Factors are float32 whatever the base is (float64 over such a one), and so are products and sums with them, rounded
once, as in PEFT.

Dimensions: B rows of a batch, N of them with these factors (or 1 for all of those), T tokens, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_file.content import LowRankSizes
from ..tensors import Float


class LowRank(NamedTuple):
    """The factors of a layer."""

    A: Float[Tensor, "*N R I"]
    B: Float[Tensor, "*N O R"]
    """With alpha / R in it."""

    @classmethod
    def of_saved(cls, sizes: LowRankSizes, saved: Sequence[Tensor], dtype: torch.dtype) -> LowRank:
        """The factors that a file has of a layer, in new memory and in the dtype of products with them."""
        A, B = saved
        return cls(A.to(dtype, copy=True), sizes.scaling * B.to(dtype))

    def outputs(self, x: Float[Tensor, "B *T I"], who: Tensor | None, y: Float[Tensor, "N *T O"]) -> Tensor:
        """The outputs of the rows that have these factors.

        Args:
            x: the inputs of all rows.
            who: the rows; None: all.
            y: their outputs of the base, which are written to where no gradients are recorded.
        """
        x = rows_of(x, who)
        tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        low = tokens.to(self.A.dtype) @ self.A.mT
        if torch.is_grad_enabled() or y.dtype != self.B.dtype or not y.is_contiguous():
            update = (low @ self.B.mT).reshape(y.shape)
            return (y + update).to(y.dtype) if torch.is_grad_enabled() else y.add_(update)
        if len(self.B) == 1:
            y.view(-1, y.shape[-1]).addmm_(low.flatten(0, 1), self.B[0].T)
        else:
            y.view(len(y), -1, y.shape[-1]).baddbmm_(low, self.B.mT)
        return y


def rows_of(values: Float[Tensor, "B ..."], who: Tensor | None) -> Float[Tensor, "N ..."]:
    """Some rows of a batch; None: all."""
    return values if who is None else values.index_select(0, who)
