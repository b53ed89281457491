"""What a layer keeps of its adapters beside their frozen side: trained vectors and strengths, by adapter name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..precision import at_least_float32
from .expressions import first_match

VECTORS = ("dvora_magnitude", "dvora_lambda_b", "dvora_lambda_d")
"""Attributes of a layer, in the order of `functional.Vectors`."""

_ROUNDED = (torch.bfloat16, torch.float16)


class VectorDict(nn.ParameterDict):
    """One trained vector by adapter name; never rounded below float32 when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorDict:
        super()._apply(at_least_float32(fn), recurse)
        return self

    def move(self, adapter_name: str, device: torch.device) -> None:
        """Move one vector, unless its values are still to come."""
        vector = self[adapter_name]
        if not vector.is_meta:
            self[adapter_name] = nn.Parameter(vector.detach().to(device), vector.requires_grad)


def told_if_rounded(magnitude: Tensor) -> Tensor:
    """The magnitude as it is.

    Warns:
        UserWarning: something has cast it below float32 by `parameter.data`, which no module sees.
    """
    if magnitude.dtype in _ROUNDED:
        # Without the layer's name, so that Python shows it once and not once a layer.
        warnings.warn(
            f"a DVoRA magnitude is in {magnitude.dtype}, which rounds it by up to 0.4 % and swallows small steps; "
            "keep the adapter's vectors in float32. TRL's trainers cast what is trained where the model is in 4 or 8 "
            "bits: hand them a model adapted with DVoRAConfig(..., inference_mode=True), and call "
            "model.set_adapter(...) when the trainer is made, before it trains",
            stacklevel=2,
        )
    return magnitude


class Strength(nn.Module):
    """s of `W + s (W' - W)`: a tensor, so that a compiled model follows when it changes.

    Args:
        like: the dtype and device to have.
        value: s.
    """

    value: Tensor

    def __init__(self, like: Tensor, value: float) -> None:
        super().__init__()
        self.register_buffer("value", like.new_full((), value), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Strength:
        super()._apply(at_least_float32(fn), recurse)
        return self


def strength_key(strengths: dict[str, float], layer_name: str) -> str:
    """The key of a layer's strength: its whole name before names and expressions that match its end."""
    return layer_name if layer_name in strengths else first_match(strengths, layer_name)
