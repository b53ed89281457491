"""The small mixed model of the histories, and its layers that can be adapted."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH, VOCABULARY = 6, 9


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.down = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    """A stack of matrices (experts, out, in) that the module multiplies with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("bli,eoi->bleo", x, self.stack)).mean(2)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": FeedForward,
    "attention": Attention,
    "experts": Experts,
}
"""Modules from (batch, length, width) to the same, applied one after the other, each beside a residual connection."""


PARAMETERS = ["experts.stack"]
"""Targets that are parameters, by their names."""
TARGETS = ["attention.inner", "embed", "experts.stack", "head", "plain.down", "plain.up"]
"""What a configuration calls the weights that can be adapted."""


class Mixed(nn.Module):
    """Token numbers (batch, length) to logits (batch, length, vocabulary) through every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
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
    with torch.random.fork_rng(devices=[]):
        model = Mixed()
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model.get_parameter("blocks.plain.down.weight")[2] = 0
    model.embed.weight[0] = 0
    return model.to(dtype)


TOKENS = torch.randint(VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(1))
COEFFICIENTS = torch.randn(4, 3, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
"""Of the outputs in the loss."""
