"""How layers store their weight, and its matrix: one row for each output feature.

Dimensions: O out, I in, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The conversion between a stored weight and its matrix (O, I)."""

    matrix: Callable[[Tensor], Tensor]
    """The matrix of a stored weight; a view where strides allow one."""
    stored: Callable[[Tensor, torch.Size], Tensor]
    """The stored weight, of the given shape, from a matrix."""


def _same(weight: Tensor) -> Tensor:
    return weight


def _same_back(matrix: Tensor, _: torch.Size) -> Tensor:
    return matrix


def _transposed(weight: Tensor) -> Tensor:
    return weight.T


def _transposed_back(matrix: Tensor, _: torch.Size) -> Tensor:
    return matrix.T


def _kernels(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _viewed_back(matrix: Tensor, shape: torch.Size) -> Tensor:
    return matrix.reshape(shape)


def _experts(weight: Tensor) -> Tensor:
    return weight.flatten(0, 1)


def _experts_transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2).flatten(0, 1)


def _experts_transposed_back(matrix: Tensor, shape: torch.Size) -> Tensor:
    experts, in_features, out_features = shape
    return matrix.reshape(experts, out_features, in_features).transpose(1, 2)


ROWS = Layout(_same, _same_back)
"""(O, I), as in `nn.Linear`."""
COLUMNS = Layout(_transposed, _transposed_back)
"""(I, O), as in transformers' `Conv1D`; an embedding table too, whose output features are its columns."""
KERNELS = Layout(_kernels, _viewed_back)
"""(O, in / groups, *kernel) of a convolution: I = in / groups * kernel elements."""
EXPERTS = Layout(_experts, _viewed_back)
"""(E, O, I): every expert brings rows of its own."""
EXPERTS_TRANSPOSED = Layout(_experts_transposed, _experts_transposed_back)
"""(E, I, O)."""
