"""DeepSpeed ZeRO-3: which weights are in memory, asked without making it gather them."""

import torch
from torch import Tensor, nn


def is_partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 manages the weight, so that it is empty except while it is gathered."""
    # Compilers cannot read attributes of a tensor.
    return not torch.compiler.is_compiling() and "ds_id" in vars(weight)


def is_in_memory(weight: Tensor) -> bool:
    """Whether a weight can be read in every pass; a trained one can, since ZeRO-3 gathers it on access to the layer."""
    return not weight.is_meta and (weight.requires_grad or not is_partitioned(weight))


def weight_in_memory(layer: nn.Module, parameter_name: str) -> Tensor | None:
    """The weight of a layer if it can be read in every pass.

    It is looked up in the layer's parameters, since attribute access would make ZeRO-3 gather a frozen weight.

    Args:
        layer: the layer with the weight.
        parameter_name: the weight's name in it.
    """
    kept = None if torch.compiler.is_compiling() else layer._parameters.get(parameter_name)
    if kept is not None and not is_in_memory(kept):
        return None
    weight = getattr(layer, parameter_name)
    assert isinstance(weight, Tensor), type(weight)
    return weight
