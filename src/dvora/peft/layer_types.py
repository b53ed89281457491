"""The layer types that the PEFT method adapts: how each holds its weight, and how it computes with an adapter.

A new type is one more row of the table. The low-rank products, `B diag(lambda_d) A x`, are computed the way the layer
uses its weight; they are (*T, O), output features last, whatever the layer's own order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from transformers.pytorch_utils import Conv1D

from .. import functional as F
from ..checks import computes_as
from ..factors import Factors
from ..layer import project, project_scaled, thin_outputs
from ..tensors import Float, is_dtensor
from ..weight import COLUMNS, EXPERTS, EXPERTS_TRANSPOSED, KERNELS, ROWS, AdaptedWeight, WeightLayout

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
LowRank = Callable[[AdaptedWeight, nn.Module, Tensor, Tensor, nn.Module], Tensor]
"""Of an adapter, its base layer, the inputs, lambda_d and the dropout of the inputs."""

_CONVOLVE = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def linear(
    adapted: AdaptedWeight, _: nn.Module, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "*B R"], dropout: nn.Module
) -> Float[Tensor, "*T O"]:
    """`(x A'^T) B^T`."""
    if adapted.by_groups is not None:
        return adapted.matrices.expand(project_scaled(adapted, dropout(x), lambda_d), len(adapted.w))
    z = project(adapted, dropout(x))
    return adapted.matrices.expand(z * lambda_d.to(z.dtype), len(adapted.w))


def lookup(
    adapted: AdaptedWeight, layer: nn.Module, ids: Tensor, lambda_d: Float[Tensor, "*B R"], dropout: nn.Module
) -> Float[Tensor, "*T O"]:
    """The same for one-hot inputs: columns of A by index, so that no table of the vocabulary's size is made."""
    assert isinstance(layer, nn.Embedding)
    z = adapted.shared.impl.select(ids, adapted.rank, adapted.in_features, layer.weight.dtype)
    mask = torch.ones_like(ids) if adapted.padding_column is None else ids != adapted.padding_column
    z = z * dropout(mask.to(z.dtype)).unsqueeze(-1)
    if adapted.by_groups is not None:
        by_row = lambda_d.reshape(-1, adapted.groups, adapted.rank)
        index = adapted.by_groups.group_of(ids).reshape(by_row.shape[0], -1, 1)
        lambda_d = torch.take_along_dim(by_row, index, 1).view(*ids.shape, adapted.rank)
    return output_scale(layer) * adapted.shared.impl.expand(z * lambda_d.to(z.dtype), adapted.out_features)


def output_scale(layer: nn.Embedding) -> float | Tensor:
    """The factor by which transformers' scaled embeddings multiply every entry; one for all others."""
    scale = vars(layer).get("embed_scale", layer._buffers.get("embed_scale"))
    return 1.0 if scale is None else scale.to(layer.weight.dtype) if isinstance(scale, Tensor) else scale


def convolve(
    adapted: AdaptedWeight, layer: nn.Module, x: Tensor, lambda_d: Float[Tensor, "*B R"], dropout: nn.Module
) -> Float[Tensor, "*T O"]:
    """A convolution with the rows of A as kernels, the same for every group, then B at every position."""
    assert isinstance(layer, Convolution)
    x = dropout(x)
    spatial, groups = len(layer.kernel_size), layer.groups
    batch = _padded(layer, x if x.dim() == spatial + 2 else x.unsqueeze(0))
    kernel = (layer.weight.shape[1], *layer.kernel_size)
    A, B, by_row = adapted.A(x), adapted.B(x), lambda_d.dim() > 1
    if not by_row and adapted.rank >= adapted.in_features:
        # The rank exceeds the kernel's size (depthwise, pointwise): one convolution with B A' costs less.
        update = (B * lambda_d.to(B.dtype)) @ A if adapted.by_groups is None else adapted.update(lambda_d).to(x.dtype)
        product = _convolution(layer, batch, update.view(-1, *kernel), groups).movedim(1, -1)
    elif adapted.by_groups is not None:
        z = _with_scaled_kernels(adapted, layer, batch, lambda_d)
        product = B.view(groups, -1, adapted.rank) @ z.flatten(3)
        product = product.view(batch.shape[0], len(B), *z.shape[3:]).movedim(1, -1)
    else:
        # Groups become batch entries, since all have the same kernels.
        z = _convolution(layer, batch.reshape(-1, kernel[0], *batch.shape[2:]), A.view(-1, *kernel), groups=1)
        positions = z.shape[2:]
        z = z.reshape(batch.shape[0], groups, adapted.rank, *positions).flatten(3)
        if by_row:
            z = z * lambda_d.to(z.dtype).view(-1, 1, adapted.rank, 1)
        else:
            B = B * lambda_d.to(B.dtype)
        product = B.view(groups, -1, adapted.rank) @ z
        product = product.view(batch.shape[0], len(B), *positions).movedim(1, -1)
    outputs: Tensor = product if x.dim() == spatial + 2 else product.squeeze(0)
    return outputs


def _with_scaled_kernels(
    adapted: AdaptedWeight, layer: Convolution, batch: Tensor, lambda_d: Float[Tensor, "*B K"]
) -> Tensor:
    """(B, groups, R, *positions): the inputs of every group convolved with the rows of A', of one adapter or of each
    row's: rows become groups of one convolution then."""
    inputs = layer.weight.shape[1]
    scaled = adapted.scaled(lambda_d.reshape(-1, lambda_d.shape[-1])).to(batch.dtype)
    rows, spatial = len(batch), batch.shape[2:]
    if len(scaled) == 1:
        z = _convolution(layer, batch.reshape(-1, inputs, *spatial), scaled.view(-1, inputs, *layer.kernel_size), 1)
    else:
        kernels = scaled[:, None].expand(-1, layer.groups, -1, -1).reshape(-1, inputs, *layer.kernel_size)
        z = _convolution(layer, batch.reshape(1, -1, *spatial), kernels, rows * layer.groups)
    return z.reshape(rows, layer.groups, adapted.rank, *z.shape[2:])


def _padded(layer: Convolution, x: Tensor) -> Tensor:
    if layer.padding_mode == "zeros":
        return x
    padded: Tensor = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return padded


def _convolution(layer: Convolution, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    convolve_: Callable[..., Tensor] = _CONVOLVE[len(layer.kernel_size)]
    return convolve_(x, weight, None, layer.stride, padding, layer.dilation, groups)


class LayerType(NamedTuple):
    """How a layer type holds and uses its weight."""

    layout: WeightLayout
    low_rank: LowRank | None
    """Inputs through A, lambda_d and B; None where the weight is read instead of a layer called."""
    spatial: int = 0
    """Number of dimensions of an output behind that of the output features."""
    has_weight: bool = True
    """False for quantised layers, whose weight is known through their forward pass only."""


LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType(ROWS, linear),
    Conv1D: LayerType(COLUMNS, linear),
    nn.Conv1d: LayerType(KERNELS, convolve, spatial=1),
    nn.Conv2d: LayerType(KERNELS, convolve, spatial=2),
    nn.Conv3d: LayerType(KERNELS, convolve, spatial=3),
    nn.Embedding: LayerType(COLUMNS, lookup),
}
FORWARD_ONLY = LayerType(ROWS, linear, has_weight=False)
"""Any layer that is linear from `in_features` to `out_features`, however it computes that."""
READ = LayerType(ROWS, None)
"""A matrix (O, I) that the module around it reads."""


def layer_type_of(layer: nn.Module, name: str) -> LayerType:
    """How a base layer holds and uses its weight.

    Raises:
        TypeError: the type is not supported; the message lists those that are.
        ValueError: the layer changes its weight while it runs.
    """
    if is_read(layer):
        return READ
    torch_type = next((torch_type for torch_type in LAYER_TYPES if isinstance(layer, torch_type)), None)
    if isinstance(layer, nn.Embedding):
        _check_embedding(layer, name)
    if torch_type is not None and _is_plain(layer, torch_type):
        return LAYER_TYPES[torch_type]
    if is_linear_by_forward(layer):
        return FORWARD_ONLY
    names = sorted(f"{t.__module__.partition('.')[0]}'s {t.__name__}" for t in (*LAYER_TYPES, nn.MultiheadAttention))
    raise TypeError(
        f"{name} of type {type(layer).__name__} is not supported; supported layers: {', '.join(names)}, and layers "
        "with in_features and out_features that are linear"
    )


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


def is_read(layer: nn.Module) -> bool:
    """Whether a layer is read by the attention around it, which never calls its forward."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)


def is_linear_by_forward(layer: nn.Module) -> bool:
    """Whether a layer states the sizes that a linear layer has, as quantised ones do."""
    return all(type(size) is int and size > 0 for size in sizes_of(layer))


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear, and called."""
    return not is_read(layer) and (isinstance(layer, nn.Linear | Conv1D) or is_linear_by_forward(layer))


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """The outputs and inputs of a linear layer."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else sizes_of(layer)


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
    expected = output_scale(layer) * nn.functional.embedding(ids, layer.weight)
    try:
        same = layer.weight.is_meta or torch.allclose(layer(ids), expected)
    except (TypeError, ValueError, RuntimeError, IndexError):
        same = False
    if not same:
        raise TypeError(
            f"{name} of type {type(layer).__name__} does more than look its entries up, so an adapter would not change "
            "its outputs as it should; leave it out with exclude_modules"
        )


class ActiveAdapter(NamedTuple):
    """One active adapter of a layer, or those of the rows of a batch, which share A and B."""

    adapted: AdaptedWeight
    factors: Factors
    dropout: nn.Module | None
    """Of the inputs of the update; None where nothing is dropped."""


def adapted_outputs(
    base_layer: nn.Module,
    layer_type: LayerType,
    x: Tensor,
    base_output: Tensor,
    adapters: Sequence[ActiveAdapter],
    bias: Tensor | None,
    in_place: bool = False,
) -> Tensor:
    """The outputs of the base with the updates of all adapters added up, in the memory format of the base's output.

    `in_place` is as for `thin_outputs`.
    """
    for adapted, _, dropout in adapters:
        if adapted.shard is not None:
            adapted.shard.check_sizes(x, base_output, adapted.name)
            if dropout is not None:
                raise ValueError(
                    f"{adapted.name}: every process would drop different inputs of a sharded weight; set "
                    "dvora_dropout=0"
                )
    if len(adapters) == 1 and layer_type.low_rank is linear:
        adapted, factors, dropout = adapters[0]
        return thin_outputs(base_output, x if dropout is None else dropout(x), adapted, factors, bias, in_place)
    features = -1 - layer_type.spatial
    outputs = base_output.movedim(features, -1)
    updates = [_update(base_layer, layer_type, x, outputs, adapter) for adapter in adapters]
    gains = [adapter.factors.gain_minus_one for adapter in adapters]
    summed = F.combine(outputs, sum(updates[1:], updates[0]), sum(gains[1:], gains[0]), None, bias)
    return summed.movedim(-1, features)


def _update(
    base_layer: nn.Module, layer_type: LayerType, x: Tensor, outputs: Tensor, adapter: ActiveAdapter
) -> Float[Tensor, "*T O"]:
    """`scale low` of one adapter."""
    assert layer_type.low_rank is not None
    adapted, factors, dropout = adapter
    if not adapted.rank:
        return outputs.new_zeros(1).expand_as(outputs)
    low = layer_type.low_rank(adapted, base_layer, x, factors.lambda_d, nn.Identity() if dropout is None else dropout)
    return factors.scale * low


def check_gradient(layer: nn.Module, layer_type: LayerType, x: Tensor, output: Tensor, name: str) -> None:
    """Refuse to train through a layer whose forward pass has no backward pass, as of some quantised layers."""
    if not layer_type.has_weight and torch.is_grad_enabled() and x.requires_grad and not output.requires_grad:
        raise RuntimeError(
            f"{name}: the base layer of type {type(layer).__name__} has no backward pass, so the layers before it "
            "would get a wrong gradient; adapt the last layers only, or quantise the base in another way"
        )
