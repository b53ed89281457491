"""The weight and the bias of a base layer: how they are read, however they are held, and how files recognise them.

A quantised layer is read by passing an identity matrix through its forward. That works for every format without knowing
it, and gives the weight that the layer really multiplies by: bitsandbytes repacks its 4-bit weights on a CPU, after
which its own dequantisation returns garbage.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..adapter_file.fingerprint import uniform_rows
from ..tensors import Float, full_precision, is_partitioned
from .layer_types import LayerType

CHUNK = 512
"""Rows of the identity matrix in one forward pass."""
TOLERANCE = 0.1
"""Largest relative deviation from a linear layer; eight-bit activations deviate by 0.02."""
_LINEARITY_STREAM, _LINEARITY_PROBES = 2**33 + 2, 4


def stored_weight(layer: nn.Module, layer_type: LayerType, parameter_name: str) -> Tensor | None:
    """The weight as it is stored now; None for a quantised layer."""
    if not layer_type.has_weight:
        return None
    weight = getattr(layer, parameter_name)
    assert isinstance(weight, Tensor), type(weight)
    return weight


def readable_weight(layer: nn.Module, layer_type: LayerType, parameter_name: str, name: str) -> Tensor:
    """The weight's values, also while it is offloaded; in float32 for a quantised layer, which must be linear.

    A weight that ZeRO-3 has partitioned is gathered, so all processes must call this.
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
        return cast(Tensor, stored_weight(layer, layer_type, parameter_name))


def measured_bias(layer: nn.Module, layer_type: LayerType) -> Float[Tensor, "O"] | None:
    """The bias of a layer that hides it (in float32) or is offloaded; None if every pass can read it from the layer."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor):
        return None if layer_type.has_weight else read_bias(layer)
    if not bias.is_meta:
        return None
    with align_module_device(layer):
        loaded = layer.bias
        assert isinstance(loaded, Tensor)
        return None if loaded.is_meta else loaded.detach().clone()


def read_operating_weight(layer: nn.Module, name: str) -> Float[Tensor, "O I"]:
    """The weight W of a layer that computes `x W^T + bias` and states its `in_features`, in float32.

    Raises:
        TypeError: the layer does not take vectors of its input features, or is not linear in them.
    """
    width: Any = layer.in_features
    with _full_forward(layer) as forward:
        try:
            zero = forward(torch.zeros(1, width))
        except Exception as error:  # a layer of another library may raise anything
            raise TypeError(
                f"{name} of type {type(layer).__name__} does not take vectors of its {width} input features "
                f"({type(error).__name__}: {error}); leave it out with exclude_modules"
            ) from error
        # Scaled up, so that a large bias does not round the products away in half precision.
        length = 2.0**8 if input_dtype(layer) == torch.float16 else 2.0**12

        def products(x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
            return (forward(length * x) - zero) / length

        chunks = [products(_units(start, width)) for start in range(0, width, CHUNK)]
        weight = torch.cat(chunks).T
        x = uniform_rows(_LINEARITY_STREAM, _LINEARITY_PROBES, width)
        expected = x.to(weight) @ weight.T
        distance = (products(x) - expected).norm() / expected.norm().clamp_min(torch.finfo().tiny)
    if not distance <= TOLERANCE:
        raise TypeError(
            f"{name} of type {type(layer).__name__} is not linear in its inputs (off by {float(distance):.1%}), so it "
            "has no weight to adapt; leave it out with exclude_modules, or target the linear layers inside it"
        )
    return weight


def read_bias(layer: nn.Module) -> Float[Tensor, "O"] | None:
    """The bias in float32: the layer's output for an input of zeros; None if that is zero."""
    width: Any = layer.in_features
    with _full_forward(layer) as forward:
        zero = forward(torch.zeros(1, width))[0]
    return zero if zero.any() else None


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors."""
    return next((tensor.device for tensor in chain(layer.parameters(), layer.buffers())), torch.device("cpu"))


def input_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer expects its inputs in."""
    declared = getattr(layer, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    tensors = chain(layer.parameters(), layer.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights in their first evaluation pass on a CPU, and unpack packed ones.

    The product with a packed weight has no backward pass, so no training could follow an evaluation.
    """
    for layer in model.modules():
        if "support_avx512bf16_for_cpu" in vars(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = False
            layer.state_dict()


@contextmanager
def _full_forward(layer: nn.Module) -> Iterator[Callable[[Float[Tensor, "T I"]], Float[Tensor, "T O"]]]:
    """A layer's forward in full precision, with outputs in float32; the layer's settings are restored afterwards."""
    settings = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    try:
        # In evaluation mode bitsandbytes rounds its inputs to eight bits, or packs its weight.
        layer.training = True
        with torch.inference_mode(False), torch.no_grad(), align_module_device(layer):
            device, dtype = device_of(layer), input_dtype(layer)
            with full_precision(device):
                yield lambda x: layer(x.to(device, dtype)).float()
    finally:
        # Some layers also remember the dtype of their first input.
        vars(layer).update(settings)


def _units(start: int, width: int) -> Float[Tensor, "T I"]:
    """Rows `start` and following of the identity matrix."""
    count = min(CHUNK, width - start)
    units = torch.zeros(count, width)
    units[range(count), range(start, start + count)] = 1
    return units
