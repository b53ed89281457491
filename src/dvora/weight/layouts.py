"""How layers store their weight, and how the method sees it: as a matrix with one row for each output feature.

Dimensions: O out, I in, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """The way between a stored weight and its matrix (O, I)."""

    matrix: Callable[[Tensor], Tensor]
    """The matrix of a stored weight; a view where strides allow one."""
    stored: Callable[[Tensor, torch.Size], Tensor]
    """The matrix back in the stored form, whose shape is given."""


def is_partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has numbered the weight as its own: it is mostly empty, or still on its way."""
    # Compilers cannot look into a tensor.
    return not torch.compiler.is_compiling() and "ds_id" in vars(weight)


def is_at_hand(weight: Tensor) -> bool:
    """Whether a weight can be read in every pass; a trained one ZeRO-3 gathers for whoever asks its layer."""
    return not weight.is_meta and (weight.requires_grad or not is_partitioned(weight))


def weight_at_hand(layer: nn.Module, parameter_name: str) -> Tensor | None:
    """The weight of a layer if it can be read in every pass.

    It is looked up where the layer keeps it: of a layer that is asked for it, ZeRO-3 gathers a frozen weight too.

    Args:
        layer: that keeps the weight.
        parameter_name: its name there.
    """
    kept = None if torch.compiler.is_compiling() else layer._parameters.get(parameter_name)
    if kept is not None and not is_at_hand(kept):
        return None
    weight = getattr(layer, parameter_name)
    assert isinstance(weight, Tensor), type(weight)
    return weight


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
