"""One frozen weight and its trained vectors, for the gain in closed form, and what the dense method says of it."""

import pytest
import torch
from torch import Tensor

from dvora import SharedProjections
from dvora import functional as F
from dvora.matrices.interface import DISTRIBUTIONS
from dvora.method.gain import row_factors
from dvora.method.norm import FrozenNorm, cross_matrix
from tests.cases import DIRECTIONS, TOLERANCE, randn
from tests.reference import DenseDVoRA

NAMES = ("magnitude", "lambda_b", "lambda_d")

every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
c_kept_or_not = pytest.mark.parametrize("keep_C", [True, False], ids=["C kept", "C made again"])


class Problem:
    """One frozen weight and its trained vectors."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dtype: torch.dtype = torch.float64,
        distribution: str = "kaiming_uniform",
        padding_column: int | None = None,
        scaling: float = 1.0,
        direction: str = "unit",
        detach_norm: bool = False,
    ) -> None:
        self.shared = SharedProjections(5, distribution)
        self.weight = randn(out_features, in_features, seed=0, dtype=dtype)
        self.padding_column, self.scaling, self.direction, self.detach_norm = (
            padding_column,
            scaling,
            direction,
            detach_norm,
        )
        self.vectors = F.Vectors(
            F.row_norm(self.weight) * (0.5 + randn(out_features, seed=4, dtype=dtype).abs()),
            randn(out_features, seed=5, dtype=dtype),
            0.3 * randn(rank, seed=6, dtype=dtype),
        )
        self.loss_gradient = randn(out_features, seed=7, dtype=dtype)
        self.scale_gradient = randn(out_features, seed=8, dtype=dtype)

    @property
    def A(self) -> Tensor:
        A = self.shared.A(len(self.vectors.lambda_d), self.weight.shape[1], torch.float64)
        if self.padding_column is not None:
            A[:, self.padding_column] = 0
        return A

    @property
    def B(self) -> Tensor:
        return self.shared.B(len(self.vectors.lambda_d), len(self.weight), torch.float64)

    def norm(self, keep_C: bool = True, keep_weight: bool = True) -> FrozenNorm:
        rank, dtype = len(self.vectors.lambda_d), self.weight.dtype
        C = cross_matrix(self.weight, self.shared.impl, rank, self.padding_column, dtype) if keep_C else None
        matrix = self.weight if keep_weight else None
        w = F.row_norm(self.weight)
        return FrozenNorm(w, C, matrix, self.shared.impl, self.weight.shape[1], rank, self.padding_column)

    def beta(self) -> Tensor:
        return F.row_scale(self.vectors.lambda_b, F.row_norm(self.weight), self.scaling, self.direction)

    def gain_minus_one(self, norm: FrozenNorm | None = None) -> Tensor:
        return self.factors(norm).gain_minus_one

    def factors(self, norm: FrozenNorm | None = None) -> F.RowFactors:
        return row_factors(self.vectors, norm or self.norm(), self.beta(), self.detach_norm)

    def gradients(self, norm: FrozenNorm | None = None) -> dict[str, Tensor]:
        for vector in self.vectors:
            vector.requires_grad_()
        found = torch.autograd.grad(self.loss(norm), self.vectors, materialize_grads=True, allow_unused=True)
        return dict(zip(NAMES, found, strict=True))

    def loss(self, norm: FrozenNorm | None = None) -> Tensor:
        gain_minus_one, scale, *_ = self.factors(norm)
        return gain_minus_one @ self.loss_gradient + scale @ self.scale_gradient

    def dense(self) -> DenseDVoRA:
        options = {"scaling": self.scaling, "direction": self.direction, "detach_norm": self.detach_norm}
        return DenseDVoRA(self.weight, None, self.A, self.B, *self.vectors, **options)

    def dense_gradients(self) -> dict[str, Tensor]:
        dense = self.dense()
        inputs = [dense.get_parameter(name) for name in NAMES]
        loss = dense.gain() @ self.loss_gradient.double() + dense.scale() @ self.scale_gradient.double()
        found = torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True)
        return dict(zip(NAMES, found, strict=True))

    def cancel(self, ratio: float, rows: list[int]) -> "Problem":
        """Let the update cancel some rows but for about `ratio` of their length."""
        update = self.scaling * (self.B * self.vectors.lambda_d.double()) @ self.A
        size = update.norm(dim=1, keepdim=True)
        rest = torch.nn.functional.normalize(self.weight.double(), dim=1)
        self.weight[rows] = (-update / size + ratio * rest)[rows].to(self.weight.dtype)
        w = F.row_norm(self.weight)
        # The rest keeps its part along the update: without one, the gradient of beta would have no digits.
        lambda_b = 1 / size[:, 0].to(w.dtype) / (w if self.direction == "unit" else 1.0)
        self.vectors.lambda_b[rows] = lambda_b[rows]
        return self
