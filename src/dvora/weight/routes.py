"""Which way a linear layer takes: the one place that decides it.

| situation | way | made for it |
|---|---|---|
| compiled, exported, under `torch.func` | PyTorch differentiates `functional` | nothing |
| training with many tokens, dense matrices, a plain layer of float32 or float64 | updated weight | V', twice |
| other training, evaluation | two thin products | nothing; in evaluation the gain is kept |
| within `dvora.merged(model)` | the base's forward alone | W', once |
"""

import torch
from torch import Tensor, nn

from ..matrices.dense import DenseMatrices
from ..matrices.interface import Matrices
from ..ops.tracing import recording, transforming

WORTH_IT = 2.0
"""By how much the thin products must exceed the updated weight in multiply-adds: those of W's size wait for memory."""


def takes_updated_weight(layer: nn.Module, x: Tensor, matrices: Matrices) -> bool:
    """Whether training goes through the updated weight.

    Args:
        layer: the base; its weight is frozen.
        x: inputs, which nothing but the layer itself changes.
        matrices: of the adapter.
    """
    if transforming() or not (recording() and isinstance(matrices, DenseMatrices) and _is_plain(layer)):
        return False
    assert isinstance(layer, nn.Linear)
    # Half precision would round small updates away.
    wide = layer.weight.dtype in (torch.float32, torch.float64) and x.dtype == layer.weight.dtype
    if not wide or layer.weight.requires_grad or torch.is_autocast_enabled(x.device.type):
        return False
    out_features, in_features = layer.weight.shape
    return pays(x.numel() // max(1, in_features), out_features, in_features)


def pays(tokens: int, out_features: int, in_features: int) -> bool:
    """The cost model, in multiply-adds by rank: `z B^T`, its transpose and `h A`, against V' made twice."""
    thin = tokens * (2 * out_features + in_features)
    updated = 2 * out_features * in_features
    return thin > WORTH_IT * updated


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer's forward is the product with its weight and nothing listens to it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        # Before its weight is asked for, which DeepSpeed's hooks would gather.
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not layer.weight.is_meta
    )
