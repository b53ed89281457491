"""The parts of the method one by one, as layers: scaled rows, scaled columns, an update of low rank; none renormalised.

Rows and columns together are HyperAdapt (arXiv 2509.18629), which PEFT does not have.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dvora import SharedProjections

D_INITIAL = 0.1


class PartsLinear(nn.Module):
    """`W' = diag(rows) (W diag(columns) + diag(w lambda_b) B diag(lambda_d) A)`, w row norms; the base at the start.

    Args:
        base: the pretrained layer, whose parameters the caller freezes.
        rows, columns: whether they are scaled.
        rank: of the update; 0: none.
        shared: A and B.
    """

    def __init__(self, base: nn.Linear, rows: bool, columns: bool, rank: int, shared: SharedProjections) -> None:
        super().__init__()
        self.base, self.rank = base, rank
        self.rows = nn.Parameter(torch.ones(base.out_features)) if rows else None
        self.columns = nn.Parameter(torch.ones(base.in_features)) if columns else None
        if rank:
            self.lambda_b = nn.Parameter(torch.zeros(base.out_features))
            self.lambda_d = nn.Parameter(torch.full((rank,), D_INITIAL))
            self.register_buffer("A", shared.A(rank, base.in_features), persistent=False)
            self.register_buffer("w_B", base.weight.detach().norm(dim=1)[:, None] * shared.B(rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype that the base alone would give."""
        y = F.linear(x if self.columns is None else (x * self.columns).to(x.dtype), self.base.weight)
        dtype = y.dtype
        if self.rank:
            y = y + F.linear(F.linear(x, self.A) * self.lambda_d, self.w_B) * self.lambda_b
        if self.rows is not None:
            y = y * self.rows
        bias = cast("Tensor | None", self.base.bias)
        return y.to(dtype) if bias is None else y.to(dtype) + bias.to(dtype)


def with_parts(
    model: nn.Module,
    *,
    rows: bool = False,
    columns: bool = False,
    rank: int = 0,
    seed: int = 0,
    targets: Sequence[str] = ("",),
) -> nn.Module:
    """The model with its linear layers adapted, in place.

    Args:
        model: frozen.
        rows, columns, rank: of `PartsLinear`.
        seed: of A and B.
        targets: how the layers' names end; left out, all.
    """
    shared = SharedProjections(seed)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and name.endswith(tuple(targets)):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, PartsLinear(layer, rows, columns, rank, shared))
    return model
