"""An adapter as dense updates: `W' - W` of every weight, by the name of the weight in the base model."""

from __future__ import annotations

from torch import Tensor, nn

from ..layer import DVoRALayer, layers_of
from ..layer_types import is_read
from ..parameters import ParamWrapper


def weight_name(layer: DVoRALayer) -> str:
    """The name of a layer's weight in the state dict of the base model."""
    if isinstance(layer, ParamWrapper) and not is_read(layer.get_base_layer()):
        return layer.name
    return f"{layer.name}.{layer.parameter_name}"


def dense_updates(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """What an adapter adds to the weights of its base, `s (W' - W)`, in float32 (float64 for a float64 base).

    Args:
        model: with the adapter.
        adapter_name: of the adapter.

    Raises:
        ValueError: the model has no such adapter.
    """
    updates = {weight_name(layer): layer.get_delta_weight(adapter_name) for layer in layers_of(model, adapter_name)}
    if not updates:
        raise ValueError(f"the model has no DVoRA adapter {adapter_name!r}")
    return updates
