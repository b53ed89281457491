"""The naive method: every matrix dense, in float64, from the definition and not from the formulas of the source.

    V  = W / ||W|| + c diag(lambda_b) B diag(lambda_d) A       direction "unit": the update is added to the unit rows
    V  = W         + c diag(lambda_b) B diag(lambda_d) A       direction "weight": it is added to the weight (DoRA)
    W' = m * V / ||V||,   y = x W'^T + bias

With lambda_d (G, R), column i of A is scaled by row floor(i G / I) of it. A row of W that is zero has no direction to
keep: its gain is one. All gradients come from autograd.
"""

import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter


class DenseDVoRA(nn.Module):
    """An adapted linear layer that forms every matrix. Tensors are copied and widened to float64."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        lambda_b: Tensor,
        lambda_d: Tensor,
        *,
        scaling: float = 1.0,
        direction: str = "unit",
        detach_norm: bool = False,
    ) -> None:
        super().__init__()
        trained = {"weight": weight, "bias": bias, "magnitude": magnitude, "lambda_b": lambda_b, "lambda_d": lambda_d}
        for name, value in trained.items():
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().double().clone()))
        self.A, self.B = A.double(), B.double()
        self.scaling, self.direction, self.detach_norm = scaling, direction, detach_norm

    @classmethod
    def of(cls, layer: DVoRAAdapter) -> "DenseDVoRA":
        base, shared = layer.base_layer, layer.shared
        return cls(
            base.weight,
            base.bias,
            shared.A(layer.rank, base.in_features, torch.float64),
            shared.B(layer.rank, base.out_features, torch.float64),
            layer.magnitude,
            layer.lambda_b,
            layer.lambda_d,
            scaling=layer.alpha / layer.rank,
            direction=layer.adapted.direction,
            detach_norm=layer.adapted.detach_norm,
        )

    def updated_weight(self) -> Tensor:
        """W with its update, before the rows are rescaled."""
        lambda_d, columns = self.lambda_d.view(-1, self.A.shape[0]), self.A.shape[1]
        of_column = [column * len(lambda_d) // columns for column in range(columns)]
        update = self.scaling * (self.lambda_b[:, None] * self.B) @ (self.A * lambda_d[of_column].T)
        return self.weight + (self.weight.norm(dim=1)[:, None] * update if self.direction == "unit" else update)

    def gain(self) -> Tensor:
        """How much longer each row has to become; one for a zero row."""
        w, n = self.weight.norm(dim=1), self.updated_weight().norm(dim=1)
        zero = w == 0
        n = torch.where(zero, 1.0, n.detach() if self.detach_norm else n)
        return torch.where(zero, 1.0, self.magnitude / n)

    def scale(self) -> Tensor:
        """`g beta`, of the low-rank product."""
        w = self.weight.norm(dim=1) if self.direction == "unit" else 1.0
        return self.gain() * self.scaling * w * self.lambda_b

    def merged_weight(self) -> Tensor:
        """W'."""
        return self.gain()[:, None] * self.updated_weight()

    @torch.no_grad()
    def norm_ratio(self) -> Tensor:
        """By how much the update changes the norm of each row, n / w."""
        return self.updated_weight().norm(dim=1) / self.weight.norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x.double() @ self.merged_weight().T
        return y if self.bias is None else y + self.bias

    def gradients(self, x: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of `sum(y * output_gradient)` by autograd, by name."""
        x = x.detach().double().requires_grad_()
        self.zero_grad()
        self(x).backward(output_gradient.double())
        return {"x": x.grad, **{name: parameter.grad for name, parameter in self.named_parameters()}}


def worst_error(value: Tensor, reference: Tensor) -> float:
    """Largest deviation relative to the reference's largest value."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    if reference.numel() == 0:
        return 0.0
    deviation = float((value.detach().double() - reference.detach()).abs().max())
    return deviation / (float(reference.detach().abs().max()) or 1.0)
