"""The weight of a quantised layer, recovered by passing an identity matrix through the layer's forward.

That works for every format without knowing it, and gives the weight that the layer really multiplies by: bitsandbytes
repacks its 4-bit weights on a CPU, after which its own dequantisation returns garbage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ...matrices import philox
from ...tensors import Float, full_precision
from .layer_types import sizes_of

CHUNK = 512
"""Rows of the identity matrix in one forward pass."""
TOLERANCE = 0.1
"""Largest relative deviation from a linear layer; eight-bit activations deviate by 0.02."""

_PROBE_SEED, _PROBE_STREAM, _PROBES = 0, 2**33 + 2, 4


def read_operating_weight(layer: nn.Module, name: str) -> Float[Tensor, "O I"]:
    """The weight W of a layer that computes `x W^T + bias`, in float32.

    Args:
        layer: with `in_features` and `out_features`.
        name: for messages.

    Raises:
        TypeError: the layer does not take vectors of its input features, or is not linear in them.
    """
    with _reading(layer) as forward:
        try:
            zero = forward.outputs(torch.zeros(1, forward.width))
        except Exception as error:  # a layer of another library may raise anything
            raise TypeError(
                f"{name} of type {type(layer).__name__} does not take vectors of its {forward.width} input features "
                f"({type(error).__name__}: {error}); leave it out with exclude_modules"
            ) from error
        starts = range(0, forward.width, CHUNK)
        weight = torch.cat([forward.products(_units(start, forward.width), zero) for start in starts]).T
        _check_linear(forward, weight, zero, name)
    return weight


def read_bias(layer: nn.Module) -> Float[Tensor, "O"] | None:
    """The bias in float32: the layer's output for an input of zeros; None if that is zero."""
    with _reading(layer) as forward:
        zero = forward.outputs(torch.zeros(1, forward.width))[0]
    return zero if zero.any() else None


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's tensors."""
    tensors = chain(layer.parameters(), layer.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def keep_differentiable(layer: nn.Module) -> None:
    """Keep bitsandbytes from packing a 4-bit weight in its first evaluation pass on a CPU, and unpack a packed one.

    The product with a packed weight has no backward pass, so no training could follow an evaluation.
    """
    if "support_avx512bf16_for_cpu" in vars(layer):
        vars(layer)["support_avx512bf16_for_cpu"] = False
        layer.state_dict()


class _Forward(NamedTuple):
    """A layer's forward pass, and the width, device and dtype of its inputs."""

    layer: nn.Module
    width: int
    device: torch.device
    dtype: torch.dtype

    def outputs(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """`x W^T + bias`."""
        outputs: Tensor = self.layer(x.to(self.device, self.dtype))
        return outputs.float()

    def products(self, x: Float[Tensor, "T I"], zero: Float[Tensor, "1 O"]) -> Float[Tensor, "T O"]:
        """`x W^T`. Inputs are scaled up, so that a large bias does not round the products away in half precision."""
        length = 2.0**8 if self.dtype == torch.float16 else 2.0**12
        return (self.outputs(length * x) - zero) / length


@contextmanager
def _reading(layer: nn.Module) -> Iterator[_Forward]:
    """Forward passes in full precision; the layer's settings are restored afterwards."""
    settings = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    _, width = sizes_of(layer)
    assert isinstance(width, int), width
    try:
        # In evaluation mode bitsandbytes rounds its inputs to eight bits, or packs its weight.
        layer.training = True
        with torch.inference_mode(False), torch.no_grad(), align_module_device(layer):
            device = device_of(layer)
            with full_precision(device):
                yield _Forward(layer, width, device, input_dtype(layer))
    finally:
        # Some layers also remember the dtype of their first input.
        vars(layer).update(settings)


def _check_linear(forward: _Forward, weight: Float[Tensor, "O I"], zero: Float[Tensor, "1 O"], name: str) -> None:
    rows = [philox.uniform_row(_PROBE_SEED, _PROBE_STREAM, row, weight.shape[1]) for row in range(_PROBES)]
    x = torch.stack([torch.from_numpy(row) for row in rows])
    expected = x.to(weight) @ weight.T
    distance = (forward.products(x, zero) - expected).norm() / expected.norm().clamp_min(torch.finfo().tiny)
    if not distance <= TOLERANCE:
        kind = type(forward.layer).__name__
        raise TypeError(
            f"{name} of type {kind} is not linear in its inputs (off by {float(distance):.1%}), so it has no weight to "
            "adapt; leave it out with exclude_modules, or target the linear layers inside it"
        )


def _units(start: int, width: int) -> Float[Tensor, "T I"]:
    """Rows `start` and following of the identity matrix."""
    count = min(CHUNK, width - start)
    units = torch.zeros(count, width)
    units[range(count), range(start, start + count)] = 1
    return units


def input_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer expects its inputs in."""
    declared = getattr(layer, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    tensors = chain(layer.parameters(), layer.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
