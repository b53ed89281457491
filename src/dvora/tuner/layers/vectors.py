"""The trained vectors and the strengths of a layer, by adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...functional import Vectors
from ...tensors import at_least_float32, version_of
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
        self[adapter_name] = nn.Parameter(value, requires_grad)


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


class StrengthDict(nn.Module):
    """s of `W + s (W' - W)` by adapter name: as tensors, so that a compiled model sees a change, and as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, tuple[float, int]] = {}
        """Each number, and the version of its tensor."""

    def put(self, adapter_name: str, number: float, like: Tensor) -> None:
        """Keep a strength, as a tensor with the dtype and device of another."""
        # They are in no state dict. Registered, no adapter could be named like an attribute.
        self._non_persistent_buffers_set.add(adapter_name)
        value = self._buffers[adapter_name] = like.new_full((), number)
        self._known[adapter_name] = number, version_of(value)

    def value(self, adapter_name: str) -> Tensor:
        """s of one adapter, a tensor without dimensions."""
        value = self._buffers[adapter_name]
        assert value is not None
        return value

    def number(self, adapter_name: str) -> float:
        """The same as a number, without a device synchronisation unless something else has written the tensor."""
        number, known = self._known[adapter_name]
        value = self.value(adapter_name)
        # Before the value, since another thread may write to it meanwhile.
        version = version_of(value)
        if version != known:
            number = float(value)
            self._known[adapter_name] = number, version
        return number

    @torch.no_grad()
    def set(self, adapter_name: str, number: float) -> None:
        """Change one in place."""
        value = self.value(adapter_name)
        value.fill_(number)
        self._known[adapter_name] = number, version_of(value)

    def move(self, adapter_name: str, device: torch.device) -> None:
        """Move one tensor."""
        self._change(adapter_name, lambda value: value.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StrengthDict:
        for adapter_name in self._buffers:
            self._change(adapter_name, at_least_float32(fn))
        return self

    def _change(self, adapter_name: str, fn: Callable[[Tensor], Tensor]) -> None:
        value, number = self.value(adapter_name), self.number(adapter_name)
        moved = fn(value)
        # It is in no state dict, so nothing would restore it from the meta device or fill it after `to_empty`.
        if moved is not value and not moved.is_meta:
            self._buffers[adapter_name] = moved
            self.set(adapter_name, number)

    def __contains__(self, adapter_name: object) -> bool:
        return adapter_name in self._buffers

    def __delitem__(self, adapter_name: str) -> None:
        del self._buffers[adapter_name], self._known[adapter_name]
        self._non_persistent_buffers_set.discard(adapter_name)


def strength_key(strengths: dict[str, float], layer_name: str) -> str:
    """The key of a layer's strength: its full name, else the first name or expression that matches its end."""
    return layer_name if layer_name in strengths else first_match(strengths, layer_name)
