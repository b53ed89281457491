"""`lambda_d` by groups of a weight's columns or rows, as a layer of its own: what is asked before the library has it.

    columns: A' = A * lambda_d[group of the column], B' = B;   rows: A' = A, B' = B * lambda_d[group of the row]
    V' = W + diag(w lambda_b) B' A',   W' = diag(m / ||V'||_row) V'

One group is DVoRA. The weight is formed in every pass; its gradients are taken from products with few rows, since those
of the weight's size would take most of a step.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.linalg import vecdot
from torch.nn import functional as F

from dvora import SharedProjections
from dvora.functional import Vectors, row_factors, row_norm, unit_rows

D_INITIAL = 0.1
By = Literal["columns", "rows", "heads"]
"""What is cut into groups; "heads" are rows of what makes queries, keys and values, and columns of all else."""


class GroupedLinear(nn.Module):
    """A linear layer with `lambda_d` by groups.

    Args:
        base: the pretrained layer, whose parameters the caller freezes.
        rank: R.
        groups: G, of consecutive columns or rows.
        rows: whether rows are cut, rather than columns.
        shared: A and B.
    """

    A: Tensor
    B: Tensor
    w: Tensor
    unit: Tensor

    def __init__(self, base: nn.Linear, rank: int, groups: int, rows: bool, shared: SharedProjections) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        size, weight = base.out_features if rows else base.in_features, base.weight.detach()
        self.sizes = torch.bincount(torch.arange(size) * groups // size)
        self.register_buffer("A", shared.A(rank, base.in_features), persistent=False)
        self.register_buffer("B", shared.B(rank, base.out_features), persistent=False)
        self.register_buffer("w", row_norm(weight), persistent=False)
        self.register_buffer("unit", unit_rows(weight, self.w), persistent=False)
        self.dvora_magnitude = nn.Parameter(self.w.clone())
        self.lambda_b = nn.Parameter(torch.zeros(base.out_features))
        self.lambda_d = nn.Parameter(torch.full((groups, rank), D_INITIAL))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        multiplied = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        # The weight and its norm are in float32 where products of inputs are not.
        with torch.autocast("cpu", enabled=False):
            scales = self.lambda_d.repeat_interleave(self.sizes, 0)
            A, B = (self.A, self.B * scales) if self.rows else (self.A * scales.T, self.B)
            cross, q = vecdot(self.unit @ A.T, B), vecdot(B @ (A @ A.T), B)
            factors = row_factors(Vectors(self.dvora_magnitude, self.lambda_b, self.lambda_d), self.w, cross, q)
            gain = 1 + factors.gain_minus_one
            y: Tensor = _Folded.apply(x.to(multiplied), A, B, gain, factors.scale, self.base.weight, self.base.bias)
        return y


class _Folded(torch.autograd.Function):
    """`x (diag(gain) W + diag(scale) B A)^T + bias`; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, gain: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        updated = torch.addmm(gain[:, None] * weight, scale[:, None] * B, A).to(x.dtype)
        y = F.linear(x, updated, bias.to(x.dtype))
        ctx.save_for_backward(x, A, B, gain, scale, bias, updated, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gain, scale, bias, updated, y = ctx.saved_tensors
        rows, inputs = dy.flatten(0, -2), x.flatten(0, -2)
        products = (rows.T @ (inputs @ A.T.to(x.dtype))).to(A.dtype)
        d_scale = vecdot(products, B)
        d_A = ((rows @ (scale[:, None] * B).to(x.dtype)).T @ inputs).to(A.dtype) if ctx.needs_input_grad[1] else None
        d_y = vecdot(rows, y.flatten(0, -2), dim=0).to(A.dtype) - bias * rows.sum(0, dtype=A.dtype)
        return dy @ updated, d_A, scale[:, None] * products, (d_y - scale * d_scale) / gain, d_scale, None, None


def with_groups(model: nn.Module, *, rank: int, groups: int, seed: int, by: By, matrices: str) -> nn.Module:
    """The model with all of its linear layers adapted, in place.

    Args:
        model: frozen.
        rank, groups: of `GroupedLinear`.
        seed: of A and B.
        by: what is cut.
        matrices: the kind of A and B, as `projection_init` names it.
    """
    shared = SharedProjections(seed, matrices)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            rows = by == "rows" or (by == "heads" and last in ("query", "key", "value"))
            setattr(model.get_submodule(parent), last, GroupedLinear(layer, rank, groups, rows, shared))
    return model
