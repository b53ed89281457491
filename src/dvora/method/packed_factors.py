"""The factors of one layer's rows, packed as token functions take them: for a whole batch, or for each row of it.

Dimensions: B rows of a batch, O out, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.annotations import Float
from .functional import RowFactors


class PackedFactors(NamedTuple):
    """The factors of one layer's rows as few tensors, which token functions take as they are.

    They are the same for the whole batch, or one for each of its rows: then *B is the batch and a one for every other
    dimension of its tokens, so that both are multiplied with tokens in the same way.
    """

    trained: Float[Tensor, "2 *B O"]
    """`g - 1` and `g beta`."""
    constant: Float[Tensor, "2 O"] | None
    """`g` and `1 - g`, without a gradient; None of rows of a batch, for which they would be as large as tokens."""
    lambda_d: Float[Tensor, "*B R"]
    """The vector itself, so that its gradients from tokens and norm are added for all layers at once."""

    @classmethod
    def of(cls, factors: RowFactors, lambda_d: Float[Tensor, "*B R"]) -> "PackedFactors":
        """The same from separate tensors."""
        gain_minus_one, scale, gain = factors
        constant = None if lambda_d.dim() > 1 else constant_factors(gain, gain_minus_one)
        return cls(torch.stack([gain_minus_one, scale]), constant, lambda_d)

    @classmethod
    def of_rows(cls, rows: Float[Tensor, "B F"], rank: int, dimensions: int) -> "PackedFactors":
        """Those that a matrix has, one for each row of a batch.

        Args:
            rows: as of `row`; views of it are kept.
            rank: R.
            dimensions: of the tokens of the batch.
        """
        ones, behind = (1,) * (dimensions - 2), rows.shape[1] - rank
        trained = rows[:, :behind].unflatten(1, (2, *ones, behind // 2)).movedim(1, 0)
        return cls(trained, None, rows[:, behind:].unflatten(1, (*ones, rank)) if ones else rows[:, behind:])

    @property
    def row(self) -> Float[Tensor, "F"]:
        """`g - 1`, `g beta` and lambda_d of one adapter, in one tensor: F = 2 O + R."""
        return torch.cat([self.trained.flatten(), self.lambda_d])

    def gathered(self, index: Tensor, dimensions: int) -> "PackedFactors":
        """Of those of N adapters, one for each row of a batch.

        Args:
            index: the place of each row's adapter, (B,).
            dimensions: of the tokens of the batch.
        """
        ones = (1,) * (dimensions - 2)
        trained, lambda_d = self.trained.index_select(1, index), self.lambda_d.index_select(0, index)
        in_rows = trained.view(2, len(index), *ones, trained.shape[2])
        return PackedFactors(in_rows, None, lambda_d.view(len(index), *ones, lambda_d.shape[1]))

    @property
    def rows(self) -> RowFactors:
        """The factors as separate tensors."""
        gain_minus_one, scale = self.trained.unbind()
        return RowFactors(gain_minus_one, scale, self.gain)

    @property
    def gain(self) -> Float[Tensor, "*B O"]:
        """`g`, without a gradient."""
        return self.trained[0].detach() + 1 if self.constant is None else self.constant[0]

    @property
    def is_by_row(self) -> bool:
        """Whether every row of the batch has factors of its own."""
        return self.lambda_d.dim() > 1

    def offset(self, bias: Float[Tensor, "O"]) -> Float[Tensor, "*B O"]:
        """`(1 - g) bias`, which the outputs need beside `g y_b`."""
        return self.trained[0].detach() * -bias if self.constant is None else self.constant[1] * bias

    def weakened(self, strength: Tensor) -> "PackedFactors":
        """The factors of `W + s (W' - W)`, for s without dimensions; for s = 1 these."""
        gain = self.gain
        # For a strength of one exactly the gain.
        weaker = torch.lerp(torch.ones_like(gain), gain, strength.to(gain.dtype))
        trained = strength * self.trained
        return PackedFactors(trained, constant_factors(weaker, trained[0]), self.lambda_d)


def constant_factors(gain: Float[Tensor, "O"], gain_minus_one: Float[Tensor, "O"]) -> Float[Tensor, "2 O"]:
    """`g` and `1 - g` as one tensor, without a gradient."""
    return torch.stack([gain.detach(), -gain_minus_one.detach()])
