"""Frozen weights and their trained vectors, for row factors in closed form, and what the dense method says of them.

The functions are those of the checked copy: every shape annotation is checked at every call.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dvora import SharedProjections
from dvora.matrices.interface import DISTRIBUTIONS
from tests.cases import DIRECTIONS, TOLERANCE, randn
from tests.checked import checked
from tests.reference import DenseDVoRA

F = checked("method.functional")
_gain, _norm = checked("method.gain"), checked("method.norm")
row_factors, PackedFactors, RowSettings = _gain.row_factors, _gain.PackedFactors, _gain.RowSettings
FrozenNorm, cross_matrix, joined = _norm.FrozenNorm, _norm.cross_matrix, _norm.joined
StackedFactors = _gain.StackedFactors

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
        seed: int = 0,
        shared: SharedProjections | None = None,
    ) -> None:
        self.shared = shared or SharedProjections(5, distribution)
        self.weight = randn(out_features, in_features, seed=seed, dtype=dtype)
        self.padding_column, self.scaling, self.direction, self.detach_norm = (
            padding_column,
            scaling,
            direction,
            detach_norm,
        )
        self.vectors = F.Vectors(
            F.row_norm(self.weight) * (0.5 + randn(out_features, seed=seed + 4, dtype=dtype).abs()),
            randn(out_features, seed=seed + 5, dtype=dtype),
            0.3 * randn(rank, seed=seed + 6, dtype=dtype),
        )
        self.loss_gradient = randn(out_features, seed=seed + 7, dtype=dtype)
        self.scale_gradient = randn(out_features, seed=seed + 8, dtype=dtype)
        self.lambda_gradient: Tensor | None = None
        """Of the lambda_d that the factors hand on to the outputs; None: it is not used."""

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
        sizes = self.weight.shape[1], rank
        return FrozenNorm(w, bool((w == 0).any()), C, matrix, self.shared.impl, *sizes, self.padding_column)

    @property
    def settings(self) -> RowSettings:
        return RowSettings(self.scaling, self.direction, self.detach_norm)

    def beta(self) -> Tensor:
        return F.row_scale(self.vectors.lambda_b, F.row_norm(self.weight), self.scaling, self.direction)

    def gain_minus_one(self, norm: FrozenNorm | None = None) -> Tensor:
        return self.factors(norm).gain_minus_one

    def factors(self, norm: FrozenNorm | None = None) -> F.RowFactors:
        return self.packed(norm).rows

    def packed(self, norm: FrozenNorm | None = None) -> PackedFactors:
        return row_factors([self.vectors], [norm or self.norm()], self.settings).packed[0]

    def gradients(self, norm: FrozenNorm | None = None) -> dict[str, Tensor]:
        for vector in self.vectors:
            vector.requires_grad_()
        found = torch.autograd.grad(self.loss(norm), self.vectors, materialize_grads=True, allow_unused=True)
        return dict(zip(NAMES, found, strict=True))

    def loss(self, norm: FrozenNorm | None = None) -> Tensor:
        return self.loss_of(self.packed(norm))

    def loss_of(self, packed: PackedFactors) -> Tensor:
        gain_minus_one, scale, *_ = packed.rows
        loss = gain_minus_one @ self.loss_gradient + scale @ self.scale_gradient
        return loss if self.lambda_gradient is None else loss + packed.lambda_d @ self.lambda_gradient

    def dense(self) -> DenseDVoRA:
        options = {"scaling": self.scaling, "direction": self.direction, "detach_norm": self.detach_norm}
        return DenseDVoRA(self.weight, None, self.A, self.B, *self.vectors, **options)

    def dense_gradients(self) -> dict[str, Tensor]:
        dense = self.dense()
        inputs = [dense.get_parameter(name) for name in NAMES]
        loss = dense.gain() @ self.loss_gradient.double() + dense.scale() @ self.scale_gradient.double()
        if self.lambda_gradient is not None:
            loss = loss + dense.lambda_d @ self.lambda_gradient.double()
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


class Layers:
    """Several frozen weights of one shape, with one pair of matrices."""

    def __init__(
        self, count: int, in_features: int, out_features: int, rank: int, *options: object, **named: object
    ) -> None:
        first = Problem(in_features, out_features, rank, *options, **named)
        others = [
            Problem(in_features, out_features, rank, *options, **named, seed=100 * index, shared=first.shared)
            for index in range(1, count)
        ]
        self.problems = [first, *others]
        for index, problem in enumerate(self.problems):
            problem.lambda_gradient = randn(rank, seed=100 * index + 9, dtype=problem.weight.dtype)

    @property
    def vectors(self) -> list[Tensor]:
        """All of them, layer by layer."""
        return [vector for problem in self.problems for vector in problem.vectors]

    def trained(self) -> "Layers":
        for vector in self.vectors:
            vector.requires_grad_()
        return self

    def norms(self, keep_C: bool = True, keep_weight: bool = True) -> list[FrozenNorm]:
        return [problem.norm(keep_C, keep_weight) for problem in self.problems]

    def joined(self) -> list[FrozenNorm]:
        """With all C as parts of one tensor."""
        norms = self.norms()
        parts = joined([norm.C for norm in norms])
        return [norm._replace(C=part) for norm, part in zip(norms, parts, strict=True)]

    def stacked(self, norms: Sequence[FrozenNorm] | None = None) -> StackedFactors:
        vectors = [problem.vectors for problem in self.problems]
        return row_factors(vectors, self.norms() if norms is None else norms, self.problems[0].settings)

    def loss(self, norms: Sequence[FrozenNorm] | None = None) -> Tensor:
        packed = self.stacked(norms).packed
        return sum(problem.loss_of(of_layer) for problem, of_layer in zip(self.problems, packed, strict=True))

    def gradients(self, norms: Sequence[FrozenNorm] | None = None) -> list[dict[str, Tensor]]:
        """Of every layer, by name."""
        self.trained()
        return self.by_layer(torch.autograd.grad(self.loss(norms), self.vectors))

    def by_layer(self, found: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        return [dict(zip(NAMES, found[3 * i : 3 * i + 3], strict=True)) for i in range(len(self.problems))]
