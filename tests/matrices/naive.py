"""A and B of every kind from their definitions, in float64."""

import math

import numpy as np
import torch
from torch import Tensor

from dvora.matrices import philox
from dvora.matrices import structured as kronecker
from dvora.matrices.vera import drawn, vera_sizes

VERA = "peft_vera(r=40, in=48, out=48)"


def matrices(kind: str, seed: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    if kind == "structured":
        return structured_side("A", rank, in_features, seed), structured_side("B", rank, out_features, seed).T
    if (sizes := vera_sizes(kind)) is not None:
        A, B = drawn(seed, sizes)
        return A[:rank, :in_features].double(), B[:out_features, :rank].double()
    A = _unscaled(seed, 0, rank, in_features) * math.sqrt(2 / in_features)
    return A, _unscaled(seed, 1, rank, out_features).T * math.sqrt(2 / rank)


def structured_side(side: str, rank: int, size: int, seed: int) -> Tensor:
    """A, or the transpose of B, of cosines behind signs."""
    n1, n2 = kronecker.factors_of_size(size)
    blocks = []
    for index, rows in enumerate(kronecker.block_rows(rank, size)):
        r1, r2 = kronecker.factors_of_rows(rows, n1, n2)
        stream = 2**34 + 2 * index + (side == "B")
        first, second = (philox.permutation_row(seed, stream, 1 + k, n) for k, n in enumerate((n1, n2)))
        signs = torch.from_numpy(philox.sign_row(seed, stream, 0, size))
        blocks.append(torch.kron(_cosine(n1)[first[:r1]], _cosine(n2)[second[:r2]])[:rows] * signs)
    return torch.cat(blocks) * math.sqrt(2 if side == "A" else 2 * size / rank)


def _unscaled(seed: int, stream: int, rank: int, size: int) -> Tensor:
    """Rows of unit variance."""
    rows = [philox.uniform_row(seed, stream, row, size).astype(float) for row in range(rank)]
    return math.sqrt(3) * torch.from_numpy(np.stack(rows))


def _cosine(n: int) -> Tensor:
    """The orthonormal DCT-II matrix."""
    rows = [[math.cos(math.pi * (k * (2 * i + 1) % (4 * n)) / (2 * n)) for i in range(n)] for k in range(n)]
    matrix = torch.tensor(rows, dtype=torch.float64) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix
