"""The layer types that the PEFT method adapts, and how each holds and uses its weight. A new type is one more row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from transformers.pytorch_utils import Conv1D

from ...checks import computes_as
from ...tensors import is_dtensor
from ...weight import COLUMNS, EXPERTS, EXPERTS_TRANSPOSED, KERNELS, ROWS, AdaptedWeight, Layout
from . import low_rank

LowRank = Callable[[AdaptedWeight, nn.Module, Tensor, Tensor, nn.Module], Tensor]
"""Of an adapter, its base layer, the inputs, lambda_d and the dropout of the inputs."""


class LayerType(NamedTuple):
    """How a layer type holds and uses its weight."""

    layout: Layout
    low_rank: LowRank | None
    """Inputs through A, lambda_d and B; None where the weight is read instead of a layer called."""
    spatial: int = 0
    """Number of dimensions of an output behind that of the output features."""
    has_weight: bool = True
    """False for quantised layers, whose weight is known through their forward pass only."""


LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(ROWS, low_rank.linear),
    Conv1D: LayerType(COLUMNS, low_rank.linear),
    nn.Conv1d: LayerType(KERNELS, low_rank.convolve, spatial=1),
    nn.Conv2d: LayerType(KERNELS, low_rank.convolve, spatial=2),
    nn.Conv3d: LayerType(KERNELS, low_rank.convolve, spatial=3),
    nn.Embedding: LayerType(COLUMNS, low_rank.lookup),
}
FORWARD_ONLY = LayerType(ROWS, low_rank.linear, has_weight=False)
"""Any layer that is linear from `in_features` to `out_features`, however it computes that."""

READ = LayerType(ROWS, None)
"""A matrix (O, I) that the module around it reads."""

# The attention around it reads its weight and never calls its forward.
READ_BY_ATTENTION = NonDynamicallyQuantizableLinear


def layer_type_of(layer: nn.Module, name: str) -> LayerType:
    """How a base layer that is called holds and uses its weight.

    Raises:
        TypeError: the type is not supported; the message lists those that are.
        ValueError: the layer changes its weight while it runs.
    """
    for torch_type, layer_type in LAYER_TYPES.items():
        if isinstance(layer, torch_type):
            if isinstance(layer, nn.Embedding):
                _check_embedding(layer, name)
            if _is_plain(layer, torch_type):
                return layer_type
            break
    if is_linear_by_forward(layer):
        return FORWARD_ONLY
    raise TypeError(f"{name} of type {type(layer).__name__} is not supported; supported layers: {_supported()}")


def parameter_type(module: nn.Module, parameter: Tensor, name: str) -> LayerType:
    """How a parameter is held that its module reads itself: (O, I), or a stack of experts.

    A stack is (E, O, I), or (E, I, O) where the module says `is_transposed`, as in transformers.

    Raises:
        TypeError: it has neither two nor three dimensions.
    """
    if parameter.dim() == 2:
        return READ
    if parameter.dim() == 3:
        return LayerType(EXPERTS_TRANSPOSED if getattr(module, "is_transposed", False) else EXPERTS, None)
    raise TypeError(
        f"{name} has shape {tuple(parameter.shape)}; DVoRA adapts matrices (out, in) and stacks of them (experts, out, "
        "in)"
    )


def is_linear_by_forward(layer: nn.Module) -> bool:
    """Whether a layer states the sizes that a linear layer has, as quantised ones do."""
    return all(type(size) is int and size > 0 for size in sizes_of(layer))


def sizes_of(layer: nn.Module) -> tuple[Any, Any]:
    """Output and input features as the layer states them; None where it does not."""
    return getattr(layer, "out_features", None), getattr(layer, "in_features", None)


def padding_column(layer: nn.Module) -> int | None:
    """The column of the weight's matrix that is never changed: an embedding's padding entry."""
    return layer.padding_idx if isinstance(layer, nn.Embedding) else None


def is_initialized(layer: nn.Module) -> bool:
    """Whether the layer's tensors exist: those of a lazy module come with its first input."""
    return not any(isinstance(p, UninitializedParameter | UninitializedBuffer) for p in layer.parameters(recurse=False))


def _is_plain(layer: nn.Module, torch_type: type[nn.Module]) -> bool:
    """Whether the layer computes what its type does, with an ordinary tensor as its weight."""
    if torch_type is nn.Linear and is_dtensor(layer._parameters.get("weight")):
        # transformers replaces the forward of a sharded layer by one that communicates.
        return type(layer).forward is nn.Linear.forward
    same = computes_as(layer, torch_type) or isinstance(layer, nn.Embedding)
    return same and type(layer.weight) in (Tensor, nn.Parameter)


@torch.no_grad()
def _check_embedding(layer: nn.Embedding, name: str) -> None:
    if layer.max_norm is not None:
        raise ValueError(
            f"{name}: the embedding renormalises its table in every pass (max_norm={layer.max_norm}), so its norms are "
            "not constant; set max_norm=None, or leave the layer out with exclude_modules"
        )
    if computes_as(layer, nn.Embedding):
        return
    ids = torch.arange(min(2, layer.num_embeddings), device=layer.weight.device)
    expected = low_rank.output_scale(layer) * nn.functional.embedding(ids, layer.weight)
    try:
        same = layer.weight.is_meta or torch.allclose(layer(ids), expected)
    except (TypeError, ValueError, RuntimeError, IndexError):
        same = False
    if not same:
        raise TypeError(
            f"{name} of type {type(layer).__name__} does more than look its entries up, so an adapter would not change "
            "its outputs as it should; leave it out with exclude_modules"
        )


def _supported() -> str:
    names = sorted(f"{t.__module__.partition('.')[0]}'s {t.__name__}" for t in (*LAYER_TYPES, nn.MultiheadAttention))
    return f"{', '.join(names)}, and layers with in_features and out_features that are linear"
