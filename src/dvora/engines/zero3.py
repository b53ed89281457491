"""DeepSpeed ZeRO-3: which weights are in memory, asked without making it gather them."""

import torch
from torch import Tensor, nn


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
