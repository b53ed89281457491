"""DVoRA with one-hot shared matrices, as a layer of its own: what is asked before the library has it.

    D[o, column_j(o)] = lambda_b[o] lambda_d[j, o],  j = 1 ... n;   V = W + D;   W' = diag(m / ||V||_row) V
    column_j(o) = (o + s_j) mod I;   a scrambled layer reads rows and columns of this in an order of its own

Where I > O each of the n stands for round(I / O) diagonals, so that every column is reached. No two of a row meet, so

    ||V_o||^2 = ||W_o||^2 + sum_j d[j, o] (2 W[o, column_j(o)] + d[j, o]),   d = lambda_b lambda_d

W' is formed in every pass. The gradient of d is n products summed over tokens, not the one of the weight's size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


class DiagonalLinear(nn.Module):
    """A linear layer with cyclic diagonals.

    Args:
        base: the pretrained layer, whose parameters the caller freezes.
        count: n.
        seed: of shifts and orders; layers of one size have the same.
        scramble: whether rows and columns are in a random order.
        near: whether shifts follow each other, rather than being drawn.
        magnitude, lambda_b: whether they are trained.
    """

    columns: Tensor
    index: Tensor
    at: Tensor
    w2: Tensor

    def __init__(
        self,
        base: nn.Linear,
        count: int,
        seed: int,
        scramble: bool = False,
        near: bool = False,
        magnitude: bool = True,
        lambda_b: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        weight = base.weight.detach()
        rows, inputs = weight.shape
        repeats = max(1, round(inputs / rows))
        apart = inputs // repeats
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(apart, generator=generator)
        first = (drawn[0] + torch.arange(count)) % apart if near else drawn[:count]
        shifts = (first[:, None] + apart * torch.arange(repeats)).reshape(-1, 1)
        columns = (torch.arange(rows) + shifts) % inputs
        if scramble:
            columns = columns[:, torch.randperm(rows, generator=generator)]
            columns = torch.randperm(inputs, generator=generator)[columns]
        self.shifts = None if scramble else shifts.flatten().tolist()
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("index", (torch.arange(rows) * inputs + columns).flatten(), persistent=False)
        self.register_buffer("at", weight.flatten()[self.index].view_as(columns), persistent=False)
        self.register_buffer("w2", weight.square().sum(1), persistent=False)
        self.dvora_magnitude = nn.Parameter(self.w2.sqrt(), requires_grad=magnitude)
        self.lambda_b = nn.Parameter(torch.ones(rows), requires_grad=lambda_b)
        self.lambda_d = nn.Parameter(torch.zeros(columns.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        x = x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x
        # The weight and its norm are in float32 where products of inputs are not.
        with torch.autocast("cpu", enabled=False):
            d = self.lambda_b * self.lambda_d
            gain = self.dvora_magnitude / (self.w2 + (d * (2 * self.at + d)).sum(0)).sqrt()
            y: Tensor = _Formed.apply(x, d, gain, self)
        return y

    def at_columns(self, x: Tensor) -> list[Tensor]:
        """(tokens, in) as it meets each diagonal: (tokens, out) of each."""
        if self.shifts is None:
            return [x[:, columns] for columns in self.columns]
        outputs, inputs = self.base.weight.shape
        repeated = torch.cat([x] * (1 + -(-outputs // inputs)), 1)
        return [repeated[:, shift : shift + outputs] for shift in self.shifts]


class _Formed(torch.autograd.Function):
    """`x (diag(gain) (W + D))^T + bias`; W and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, gain: Tensor, layer: DiagonalLinear) -> Tensor:
        weight, bias = layer.base.weight, layer.base.bias
        updated = weight * gain[:, None]
        updated.view(-1).index_add_(0, layer.index, (gain * d).flatten())
        updated = updated.to(x.dtype)
        y = F.linear(x, updated, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(x, gain, bias, updated, y)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, bias, updated, y = ctx.saved_tensors
        rows, exact = dy.flatten(0, -2), gain.dtype
        d_d = torch.stack([(rows * part).sum(0, dtype=exact) for part in ctx.layer.at_columns(x.flatten(0, -2))])
        of_outputs = (rows * y.flatten(0, -2)).sum(0, dtype=exact)
        of_bias = 0 if bias is None else bias * rows.sum(0, dtype=exact)
        return dy @ updated, gain * d_d, (of_outputs - of_bias) / gain, None


def with_diagonals(model: PreTrainedModel, *, count: int, seed: int, **options: bool) -> nn.Module:
    """The model with all of its linear layers adapted but the one that makes logits, in place.

    Args:
        model: frozen.
        count, seed, options: of `DiagonalLinear`.
    """
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, DiagonalLinear(layer, count, seed, **options))
    return model
