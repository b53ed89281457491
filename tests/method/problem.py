"""One adapted weight as plain tensors, for the pure functions, whose every shape annotation is checked here."""

import torch
from torch import Tensor

from tests.cases import randn
from tests.checked import checked
from tests.reference import DenseDVoRA

F = checked("method.functional")


class Problem:
    """One adapted weight as plain tensors."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, dtype: torch.dtype = torch.float64, **options: object
    ) -> None:
        self.weight = randn(out_features, in_features, seed=0, dtype=dtype)
        self.bias = randn(out_features, seed=1, dtype=dtype)
        self.A = randn(rank, in_features, seed=2, dtype=dtype) * (2 / in_features) ** 0.5
        self.B = randn(out_features, rank, seed=3, dtype=dtype) * (2 / rank) ** 0.5
        self.vectors = F.Vectors(
            F.row_norm(self.weight) * (0.5 + randn(out_features, seed=4, dtype=dtype).abs()),
            randn(out_features, seed=5, dtype=dtype),
            0.3 * randn(rank, seed=6, dtype=dtype),
        )
        self.x = randn(2, 3, in_features, seed=7, dtype=dtype)
        self.options = options

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.A, self.B

    def norm(self) -> object:
        return F.norm_terms(self.weight, self.A, self.B)

    def beta(self) -> Tensor:
        return F.row_scale(
            self.vectors.lambda_b,
            F.row_norm(self.weight),
            self.options.get("scaling", 1.0),
            self.options.get("direction", "unit"),
        )

    def dense(self) -> DenseDVoRA:
        return DenseDVoRA(self.weight, self.bias, self.A, self.B, *self.vectors, **self.options)
