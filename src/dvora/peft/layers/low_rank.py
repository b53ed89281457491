"""The low-rank product `B diag(lambda_d) A x` of every layer type, computed the way the layer uses its weight.

Every function returns (*T, O): output features last, whatever the layer's own order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...layer import project
from ...tensors import Float
from ...weight import AdaptedWeight

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVOLVE = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


def linear(
    adapted: AdaptedWeight, _: nn.Module, x: Float[Tensor, "*T I"], lambda_d: Float[Tensor, "*B R"], dropout: nn.Module
) -> Float[Tensor, "*T O"]:
    """`((x A^T) lambda_d) B^T`."""
    z = project(adapted, dropout(x))
    return adapted.matrices.expand(z * lambda_d.to(z.dtype), len(adapted.w))


def lookup(
    adapted: AdaptedWeight, layer: nn.Module, ids: Tensor, lambda_d: Float[Tensor, "*B R"], dropout: nn.Module
) -> Float[Tensor, "*T O"]:
    """The same for one-hot inputs: columns of A by index, so that no table of the vocabulary's size is made."""
    assert isinstance(layer, nn.Embedding)
    z = adapted.shared.impl.select(ids, adapted.rank, adapted.in_features, layer.weight.dtype)
    kept = torch.ones_like(ids) if adapted.padding_column is None else ids != adapted.padding_column
    z = z * dropout(kept.to(z.dtype)).unsqueeze(-1)
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
    if by_row or adapted.rank < adapted.in_features:
        # Groups become batch entries, since all have the same kernels.
        z = _convolution(layer, batch.reshape(-1, kernel[0], *batch.shape[2:]), A.view(-1, *kernel), groups=1)
        positions = z.shape[2:]
        z = z.reshape(len(batch), groups, adapted.rank, -1)
        if by_row:
            z = z * lambda_d.to(z.dtype).view(-1, 1, adapted.rank, 1)
        else:
            B = B * lambda_d.to(B.dtype)
        product = B.view(groups, -1, adapted.rank) @ z
        product = product.view(len(batch), -1, *positions).movedim(1, -1)
    else:
        # The rank exceeds the kernel's size (depthwise, pointwise): one convolution with B A costs less.
        product = _convolution(layer, batch, ((B * lambda_d.to(B.dtype)) @ A).view(-1, *kernel), groups).movedim(1, -1)
    outputs: Tensor = product if x.dim() == spatial + 2 else product.squeeze(0)
    return outputs


def _padded(layer: Convolution, x: Tensor) -> Tensor:
    if layer.padding_mode == "zeros":
        return x
    padded: Tensor = torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    return padded


def _convolution(layer: Convolution, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    convolve_: Callable[..., Tensor] = _CONVOLVE[len(layer.kernel_size)]
    return convolve_(x, weight, None, layer.stride, padding, layer.dilation, groups)
