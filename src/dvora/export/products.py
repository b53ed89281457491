"""A and B as a graph multiplies by them: as values where they are few, in one operation in place of six.

Every operation takes its time to trace and to start. In onnxruntime 1.32, on one core, the product by factors takes 1.3
and 1.1 of the time of that by values with 384 x 64 (1 and 128 tokens), 1.0 and 0.7 with 1536 x 64, and 0.9 and 0.4 with
576 x 256.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..matrices.base import Matrices
from ..tensors import Float
from ..weight import AdaptedWeight

FEW = 2**17
"""Values of A or B, at most."""


class _ByValues(Matrices):
    def __init__(self, of: Matrices) -> None:
        super().__init__(of.seed)
        self.of = of

    def project(self, x: Float[Tensor, "*T I"], rank: int) -> Float[Tensor, "*T R"]:
        if (size := x.shape[-1]) * rank > FEW:
            return self.of.project(x, rank)
        return x @ self.of.values("A", rank, size, x.dtype, keep=True).T

    def expand(self, z: Float[Tensor, "*T R"], out_features: int) -> Float[Tensor, "*T O"]:
        if (rank := z.shape[-1]) * out_features > FEW:
            return self.of.expand(z, out_features)
        return z @ self.of.values("B", rank, out_features, z.dtype, keep=True)

    def select(self, index: Tensor, rank: int, in_features: int, dtype: torch.dtype) -> Float[Tensor, "*T R"]:
        return self.of.select(index, rank, in_features, dtype)


@contextmanager
def few_operations(weight: AdaptedWeight) -> Iterator[None]:
    """While a layer is traced: products with few values are one operation."""
    before = weight.matrices
    if weight.rank:
        # Values are made outside of a graph.
        before.reserve(weight.rank, weight.in_features, weight.out_features, torch.float32, values=True)
        weight.matrices = _ByValues(before)
    try:
        yield
    finally:
        weight.matrices = before
