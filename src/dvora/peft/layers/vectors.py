"""The trained vectors of a layer by adapter name, and how strengths are named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...tensors import at_least_float32
from ..expressions import first_match

VECTORS = ("dvora_magnitude", "dvora_lambda_b", "dvora_lambda_d")
"""Attributes of a layer, in the order of `functional.Vectors`."""


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


def strength_key(strengths: dict[str, float], layer_name: str) -> str:
    """The key of a layer's strength: its full name, else the first name or expression that matches its end."""
    return layer_name if layer_name in strengths else first_match(strengths, layer_name)
