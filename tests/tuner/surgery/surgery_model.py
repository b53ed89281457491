"""The small mixed model of the surgery histories, and the table of its weights that can be adapted.

A layer type more is a block in `BLOCKS` and a line for each of its weights in `WEIGHTS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, VOCABULARY = 6, 9


class FeedForward(nn.Module):
    """Linear layers, with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Transposed(nn.Module):
    """Linear layers that store their weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(5, WIDTH)
        self.down = Conv1D(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {"plain": FeedForward, "transposed": Transposed}
"""Modules from (batch, length, width) to the same, applied one after the other, each beside a residual connection."""


class View(NamedTuple):
    """How a stored weight is seen as a matrix (rows, columns), and back."""

    matrix: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor, torch.Size], Tensor]


AS_IT_IS = View(lambda weight: weight, lambda matrix, shape: matrix)
TRANSPOSED = View(lambda weight: weight.T, lambda matrix, shape: matrix.T)


class Weight(NamedTuple):
    """A weight that can be adapted."""

    view: View
    target: str
    """What a configuration calls its layer."""


WEIGHTS: dict[str, Weight] = {
    "blocks.plain.up.weight": Weight(AS_IT_IS, "plain.up"),
    "blocks.plain.down.weight": Weight(AS_IT_IS, "plain.down"),
    "blocks.transposed.up.weight": Weight(TRANSPOSED, "transposed.up"),
    "blocks.transposed.down.weight": Weight(TRANSPOSED, "transposed.down"),
}
"""By the name of the parameter in the base model."""

AVAILABLE: frozenset[str] = frozenset()
"""What is there of "strength", "train", "magnitude_modules", "interpolate_adapters", "add_weighted_adapter"."""

TARGETS = sorted({weight.target for weight in WEIGHTS.values()})


class Mixed(nn.Module):
    """Token numbers (batch, length) to logits (batch, length, vocabulary) through every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleDict({name: make() for name, make in BLOCKS.items()})
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks.values():
            x = x + torch.tanh(block(x))
        return self.head(x)


@torch.no_grad()
def mixed(dtype: torch.dtype = torch.float32) -> Mixed:
    """The model with the same values each time; one row of one weight is zero, and no bias is."""
    generator = torch.Generator().manual_seed(0)
    model = Mixed()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model.get_parameter("blocks.plain.down.weight")[2] = 0
    return model.to(dtype)


TOKENS = torch.randint(VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(1))
COEFFICIENTS = torch.randn(4, 3, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
"""Of the outputs in the loss."""
