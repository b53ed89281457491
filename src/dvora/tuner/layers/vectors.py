"""The trained vectors and the strengths of a layer, by adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...engines.fsdp2 import note_never_gathered
from ...method.functional import Vectors
from ...ops.dtypes import at_least_float32
from ...ops.tracing import version_of
from ..expressions import first_match

VECTORS = ("dvora_magnitude", "dvora_lambda_b", "dvora_lambda_d")
"""Attributes of a layer, in the order of `functional.Vectors`."""

_ROUNDED = (torch.bfloat16, torch.float16)


class VectorDict(nn.ParameterDict):
    """One vector by adapter name; stays in float32 or above when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorDict:
        super()._apply(at_least_float32(fn), recurse)
        return self

    def move(self, adapter_name: str, device: torch.device) -> None:
        """Move one vector, unless there is none or it is on the meta device."""
        vector = self.get(adapter_name)
        if vector is not None and not vector.is_meta:
            self.put(adapter_name, vector.detach().to(device), vector.requires_grad)

    def put(self, adapter_name: str, value: Tensor, requires_grad: bool = True) -> None:
        """Keep a vector as a parameter."""
        parameter = self[adapter_name] = nn.Parameter(value, requires_grad)
        note_never_gathered(parameter)


def warn_if_rounded(magnitude: Tensor) -> None:
    """Warn of a magnitude in half precision.

    Warns:
        UserWarning: it was cast below float32 through `parameter.data`, which no module can prevent.
    """
    if magnitude.dtype in _ROUNDED:
        # Without the layer's name, so that Python shows it once instead of once a layer.
        warnings.warn(
            f"a DVoRA magnitude is in {magnitude.dtype}, which rounds it by up to 0.4 % and loses small steps; "
            "keep the adapter's vectors in float32. TRL's trainers cast what is trained where the model is in 4 or 8 "
            "bits: hand them a model adapted with DVoRAConfig(..., inference_mode=True), and call "
            "model.set_adapter(...) when the trainer is made, before it trains",
            stacklevel=2,
        )


def vectors_in(dicts: Sequence[VectorDict], adapter_name: str) -> Vectors:
    """The vectors of one adapter; lambda_b is zero and lambda_d empty where it has the magnitude only.

    Args:
        dicts: in the order of `VECTORS`.
        adapter_name: in all of them, or in the first only.
    """
    magnitudes, lambdas_b, lambdas_d = dicts
    magnitude = _vector(magnitudes, adapter_name)
    warn_if_rounded(magnitude)
    if adapter_name not in lambdas_b:
        return Vectors(magnitude, torch.zeros_like(magnitude), magnitude.new_empty(0))
    return Vectors(magnitude, _vector(lambdas_b, adapter_name), _vector(lambdas_d, adapter_name))


def _vector(vectors: VectorDict, adapter_name: str) -> Tensor:
    """One of them, quickly; FSDP keeps its views of parameters elsewhere."""
    parameters = vectors._parameters
    # By subscription, which makes ZeRO-3 gather it.
    vector: Tensor | None = parameters[adapter_name] if adapter_name in parameters else vectors[adapter_name]
    assert vector is not None
    return vector


class Strength(nn.Module):
    """s of `W + s (W' - W)`: as a tensor, so that a compiled model sees a change, and as a number.

    Args:
        like: the dtype and device to have.
        number: s.
    """

    value: Tensor

    def __init__(self, like: Tensor, number: float) -> None:
        super().__init__()
        self.register_buffer("value", like.new_full((), number), persistent=False)
        self._known = number, version_of(self.value)

    @property
    def number(self) -> float:
        """s, without a device synchronisation unless something else has written the tensor."""
        number, version = self._known
        # Not as an attribute, which modules take as long to look up as a small product takes.
        value = self._buffers["value"]
        assert value is not None
        if version != version_of(value):
            # Before the value, since another thread may write to it meanwhile.
            version = version_of(value)
            number = float(value)
            self._known = number, version
        return number

    @torch.no_grad()
    def set(self, number: float) -> None:
        """Change s in place."""
        self.value.fill_(number)
        self._known = number, version_of(self.value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Strength:
        value, number = self.value, self.number
        moved = at_least_float32(fn)(value)
        # It is in no state dict, so nothing would restore it from the meta device or fill it after `to_empty`.
        if moved is not value and not moved.is_meta:
            self.value = moved
            self.set(number)
        return self


def strength_key(strengths: dict[str, float], layer_name: str) -> str:
    """The key of a layer's strength: its full name, else the first name or expression that matches its end."""
    return layer_name if layer_name in strengths else first_match(strengths, layer_name)
