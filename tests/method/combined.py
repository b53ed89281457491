"""The operands of a combined output, the plain formula in float64, and the sizes that its terms have."""

from typing import NamedTuple

import torch
from dvora.method.combine import combine
from torch import Tensor

from dvora import SharedProjections
from dvora.ops.dtypes import norm_dtype
from tests.cases import randn

KINDS = {name: SharedProjections(3, name).impl for name in ("kaiming_uniform", "structured")}


class Operands(NamedTuple):
    """The arguments of `combine`, in its order."""

    base_output: Tensor
    z: Tensor
    lambda_d: Tensor
    gain_minus_one: Tensor
    scale: Tensor
    bias: Tensor | None

    def map(self, change: object) -> "Operands":
        return Operands(*(None if t is None else change(t) for t in self))

    def trained(self) -> "Operands":
        return self.map(lambda t: t.detach().clone().requires_grad_())

    def combined(self, kind: str) -> Tensor:
        return combine(*self, KINDS[kind])


def operands(
    tokens: tuple[int, ...],
    rank: int,
    out: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    gain_distance: float = 0.3,
    seed: int = 0,
) -> Operands:
    wide = norm_dtype(dtype)
    return Operands(
        randn(*tokens, out, seed=seed, dtype=dtype),
        randn(*tokens, rank, seed=seed + 1, dtype=dtype),
        0.3 * randn(rank, seed=seed + 2, dtype=wide),
        gain_distance * randn(out, seed=seed + 3, dtype=wide),
        randn(out, seed=seed + 4, dtype=wide),
        randn(out, seed=seed + 5, dtype=dtype) if bias else None,
    )


def plain(o: Operands, kind: str, sizes: bool = False) -> Tensor:
    """The formula; with `sizes`, the sum of the absolute values of all that it adds up."""
    B = KINDS[kind].B(o.z.shape[-1], o.base_output.shape[-1], torch.float64)
    bias = torch.zeros(()) if o.bias is None else o.bias
    if sizes:
        B, bias = B.abs(), -bias
    update = o.scale * ((o.z * o.lambda_d) @ B.T)
    return o.base_output + o.gain_minus_one * (o.base_output - bias) + update


def gradients(o: Operands, y: Tensor, grad_output: Tensor, **options: bool) -> Operands:
    leaves = [t for t in o if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, leaves, grad_output, **options))
    return Operands(*(next(found) if t is not None and t.requires_grad else None for t in o))


def expected_gradients(o: Operands, kind: str, grad_output: Tensor) -> tuple[Operands, Operands]:
    """The gradients of the formula in float64, and for each the sum of the absolute values of what it adds up."""
    exact, large = (o.map(change).trained() for change in (Tensor.double, lambda t: t.double().abs()))
    sizes = gradients(large, plain(large, kind, sizes=True), grad_output.double().abs())
    return gradients(exact, plain(exact, kind), grad_output.double()), sizes.map(Tensor.abs)
