"""The base layer under an adapter: how its weight and bias are read, and what is refused."""

from __future__ import annotations

import importlib

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...tensors import TensorVersion, is_dtensor, is_partitioned
from .layer_types import LayerType
from .opaque_weight import read_bias, read_operating_weight


class Fingerprinted:
    """The state of the weight when its fingerprint was taken, so that a change is noticed; a copy has none.

    Args:
        weight: as stored, or None where only its layer knows it.
    """

    def __init__(self, weight: Tensor | None = None) -> None:
        self._state = None if weight is None or is_dtensor(weight) else TensorVersion.of(weight)

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight is unchanged; an inference tensor has no version and always counts as changed."""
        return self._state is not None and self._state.is_of(weight)

    def __reduce__(self) -> tuple[type[Fingerprinted], tuple[()]]:
        return Fingerprinted, ()


def stored_weight(layer: nn.Module, layer_type: LayerType, parameter_name: str) -> Tensor | None:
    """The weight as it is stored now; None for a quantised layer."""
    if not layer_type.has_weight:
        return None
    weight = getattr(layer, parameter_name)
    assert isinstance(weight, Tensor), type(weight)
    return weight


def readable_weight(layer: nn.Module, layer_type: LayerType, parameter_name: str, name: str) -> Tensor:
    """The weight's values, also while it is offloaded; in float32 for a quantised layer.

    A weight that ZeRO-3 has partitioned is gathered, so all processes must call this.

    Raises:
        TypeError: the layer is not linear.
    """
    stored = stored_weight(layer, layer_type, parameter_name)
    if stored is None:
        return read_operating_weight(layer, name)
    if is_partitioned(stored) and not stored.numel():
        with importlib.import_module("deepspeed").zero.GatheredParameters([stored]):
            return stored.detach().clone()
    if not stored.is_meta:
        return stored
    with align_module_device(layer):
        stored = stored_weight(layer, layer_type, parameter_name)
        assert stored is not None
        return stored


def measured_bias(layer: nn.Module, layer_type: LayerType) -> Tensor | None:
    """The bias of a layer that hides it or is offloaded; None if every pass can read it from the layer."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor):
        return None if layer_type.has_weight else read_bias(layer)
    if not bias.is_meta:
        return None
    with align_module_device(layer):
        loaded = layer.bias
        assert isinstance(loaded, Tensor)
        return None if loaded.is_meta else loaded.detach().clone()
