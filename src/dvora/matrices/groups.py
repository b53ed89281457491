"""lambda_d by groups: what each column of A is scaled by, and the sums over the columns of a group.

Dimensions: N adapters, I columns, R rank, K = G R values of G groups, those of a group one after another.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import Float


class Groups(NamedTuple):
    """Consecutive columns in groups of about one size: column i is in group floor(i G / I)."""

    groups: int
    """G."""
    columns: int
    """I."""

    def scaled(self, A: Float[Tensor, "R I"], lambda_d: Float[Tensor, "*N K"]) -> Float[Tensor, "*N R I"]:
        """`A'`: A with every column scaled by the lambda_d of its group."""
        # Not their number, of which a graph would make a constant.
        leading = (-1,) * (lambda_d.dim() - 1)
        by_group = lambda_d.view(*leading, self.groups, len(A)).mT
        if self.columns % self.groups:
            scaled: Tensor = A * by_group[..., self.group_of(torch.arange(self.columns, device=A.device))]
            return scaled
        scaled = A.view(len(A), self.groups, -1) * by_group.unsqueeze(-1)
        return scaled.view(*leading, *A.shape)

    def are_few(self, x: Float[Tensor, "N T I"]) -> bool:
        """Whether each adapter has so few tokens that its A' is more than what it is read for."""
        return x.shape[1] * self.groups < self.columns

    def contracted(
        self, x: Float[Tensor, "N T I"], A: Float[Tensor, "R I"], lambda_d: Float[Tensor, "N K"]
    ) -> Float[Tensor, "N T R"]:
        """`x A'^T` of each adapter's tokens, without A': by groups first, which are scaled and summed then."""
        by_group = lambda_d.view(len(x), 1, self.groups, len(A)).movedim(2, 0)
        return (self.products(x, A) * by_group).sum(0)

    def sums(self, values: Float[Tensor, "*N R I"]) -> Float[Tensor, "*N K"]:
        """The sum over the columns of each group: the gradient of lambda_d from `A` times that of `A'`."""
        if self.columns % self.groups:
            index = self.group_of(torch.arange(self.columns, device=values.device))
            by_group = values.new_zeros(*values.shape[:-1], self.groups).index_add(-1, index, values)
        else:
            by_group = values.view(*values.shape[:-1], self.groups, -1).sum(-1)
        return by_group.mT.reshape(*values.shape[:-2], -1)

    def products(self, x: Float[Tensor, "*T I"], A: Float[Tensor, "R I"]) -> Float[Tensor, "G *T R"]:
        """`x A^T` of the columns of each group by themselves."""
        if self.columns % self.groups:
            return torch.stack([x[..., first:stop] @ A[:, first:stop].T for first, stop in self.bounds()])
        of_groups = x.reshape(-1, self.groups, self.columns // self.groups).transpose(0, 1)
        products = of_groups @ A.view(len(A), self.groups, -1).permute(1, 2, 0)
        return products.view(self.groups, *x.shape[:-1], len(A))

    def group_of(self, columns: Tensor) -> Tensor:
        """The group of each of these columns."""
        return columns * self.groups // self.columns

    def bounds(self) -> list[tuple[int, int]]:
        """The first column of each group, and the first behind it."""
        return list(pairwise(-(-group * self.columns // self.groups) for group in range(self.groups + 1)))
