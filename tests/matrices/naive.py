"""A and B of every kind from their definitions, in float64."""

import math

import numpy as np
import torch
from torch import Tensor

from dvora.matrices import philox
from dvora.matrices.vera import drawn, vera_sizes

VERA = "peft_vera(r=40, in=48, out=48)"


def matrices(kind: str, seed: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    if (sizes := vera_sizes(kind)) is not None:
        A, B = drawn(seed, sizes)
        return A[:rank, :in_features].double(), B[:out_features, :rank].double()
    A = _unscaled(seed, 0, rank, in_features) * math.sqrt(2 / in_features)
    return A, _unscaled(seed, 1, rank, out_features).T * math.sqrt(2 / rank)


def _unscaled(seed: int, stream: int, rank: int, size: int) -> Tensor:
    """Rows of unit variance."""
    rows = [philox.uniform_row(seed, stream, row, size).astype(float) for row in range(rank)]
    return math.sqrt(3) * torch.from_numpy(np.stack(rows))
