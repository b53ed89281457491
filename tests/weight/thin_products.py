"""The operands of an adapted output, the plain formula in float64, and the sizes that its terms have.

The functions are those of the checked copy: every shape annotation is checked at every call.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dvora import SharedProjections
from dvora.ops.dtypes import norm_dtype
from tests.cases import randn
from tests.checked import checked

F = checked("method.functional")
PackedFactors = checked("method.packed_factors").PackedFactors
PassFactors = checked("weight.factors").PassFactors
AdaptedWeight = checked("weight.adapted_weight").AdaptedWeight
_linear = checked("weight.linear")
Update, adapted_linear = _linear.Update, _linear.adapted_linear

KINDS = {name: SharedProjections(3, name).impl for name in ("kaiming_uniform", "structured")}


class _Projected(checked("matrices.interface").SharedProjections):
    """Projections whose inputs are projected already, so that z itself can be given."""

    def project_once(self, x: Tensor, rank: int, reader: object) -> Tensor:
        return x


@cache
def adapted_weight(kind: str, out_features: int, rank: int, dtype: torch.dtype) -> AdaptedWeight:
    """One whose inputs are z."""
    return AdaptedWeight(torch.ones(out_features, 1, dtype=dtype), rank, shared=_Projected(3, kind))


class Operands(NamedTuple):
    """What an adapted output is made from."""

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

    def update(self, kind: str, keeps: bool = False) -> Update:
        """An adapter with these factors; `keeps` what evaluation makes of them."""
        trained, gain = torch.stack([self.gain_minus_one, self.scale]), 1 + self.gain_minus_one
        packed = PackedFactors(trained, torch.stack([gain, -self.gain_minus_one]).detach(), self.lambda_d)
        adapted = adapted_weight(kind, len(self.scale), len(self.lambda_d), norm_dtype(self.scale.dtype))
        vectors = F.Vectors(adapted.w, torch.zeros_like(adapted.w), self.lambda_d)
        return Update(adapted, vectors, PassFactors(packed, {} if keeps else None), adapted.matrices)

    def combined(self, kind: str) -> Tensor:
        return adapted_linear(self.update(kind), self.base_output, self.z, self.bias)


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
