"""HyperAdapt (arXiv 2509.18629), which PEFT does not have: vectors scale rows and columns of frozen weights."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ScaledLinear(nn.Module):
    """`W' = diag(rows) W diag(columns)`, the base itself at the start; as many parameters as LoRA r=1.

    Args:
        base: the pretrained layer, whose parameters the caller freezes.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(torch.ones(base.out_features))
        self.columns = nn.Parameter(torch.ones(base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = F.linear(x * self.columns, self.base.weight)
        # In the dtype of a linear layer's outputs, which under autocast is not that of the vectors.
        y = (y * self.rows).to(y.dtype)
        bias = cast("Tensor | None", self.base.bias)
        return y if bias is None else y + bias.to(y.dtype)


def scaled(model: nn.Module, targets: Sequence[str] = ("",)) -> nn.Module:
    """The model with its linear layers scaled, in place.

    Args:
        model: frozen.
        targets: how their names end; left out, all.
    """
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and name.endswith(tuple(targets)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, ScaledLinear(layer))
    return model
