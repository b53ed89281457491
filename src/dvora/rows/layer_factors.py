"""What adapters of other methods do in a linear layer, for rows of a batch, each with factors of its own.

| method | outputs |
|---|---|
| LoRA | `y + B (A x)` |
| (IA)3 | `scale y`, or y of `scale x` |
| RoAd | of each pair (y, z): `c y - s z` and `c' z + s' y` |

Factors are float32 whatever the base is (of LoRA float64 over such a one), and so are products and sums with them,
rounded once, as in PEFT: near one, half precision has few digits.

Dimensions: B rows of a batch, N of them with these factors (or 1 for all of those), T tokens, I in, O out, R rank, G
groups of outputs, H pairs in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_file.content import FactorSizes
from ..tensors import Float


class LowRank(NamedTuple):
    """Of LoRA."""

    A: Float[Tensor, "*N R I"]
    B: Float[Tensor, "*N O R"]
    """With alpha / R in it."""

    def outputs(self, x: Float[Tensor, "B *T I"], who: Tensor | None, y: Float[Tensor, "N *T O"]) -> Tensor:
        """The outputs of the rows that have these factors.

        Args:
            x: the inputs of all rows.
            who: the rows; None: all.
            y: their outputs of the base, which are written to where no gradients are recorded.
        """
        x = rows_of(x, who)
        tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        low = tokens.to(self.A.dtype) @ self.A.mT
        if torch.is_grad_enabled() or y.dtype != self.B.dtype or not y.is_contiguous():
            update = (low @ self.B.mT).reshape(y.shape)
            return (y + update).to(y.dtype) if torch.is_grad_enabled() else y.add_(update)
        if len(self.B) == 1:
            y.view(-1, y.shape[-1]).addmm_(low.flatten(0, 1), self.B[0].T)
        else:
            y.view(len(y), -1, y.shape[-1]).baddbmm_(low, self.B.mT)
        return y


class InputScales(NamedTuple):
    """Of (IA)3, where it multiplies a layer's inputs."""

    scales: Float[Tensor, "*N I"]

    def inputs(self, x: Float[Tensor, "N *T I"]) -> Float[Tensor, "N *T I"]:
        """The inputs of the rows that have these factors."""
        scaled: Tensor = x * _for_tokens(self.scales, x)
        return scaled.to(x.dtype)


class OutputScales(NamedTuple):
    """Of (IA)3."""

    scales: Float[Tensor, "*N O"]

    def outputs(self, _: Tensor, __: Tensor | None, y: Float[Tensor, "N *T O"]) -> Tensor:
        """See `LowRank`."""
        scales = _for_tokens(self.scales, y)
        return (y * scales).to(y.dtype) if torch.is_grad_enabled() else y.mul_(scales)


class Rotations(NamedTuple):
    """Of RoAd: outputs of a group are paired with those of its other half."""

    cos: Float[Tensor, "*N G 2 H"]
    sin: Float[Tensor, "*N G 2 H"]

    def outputs(self, _: Tensor, __: Tensor | None, y: Float[Tensor, "N *T O"]) -> Tensor:
        """See `LowRank`."""
        pairs: Tensor = y.unflatten(-1, self.cos.shape[-3:])
        cos, sin = (_for_tokens(factor, pairs, 3) for factor in self)
        rotated = pairs * cos
        for half, sign in ((0, -1), (1, 1)):
            rotated.select(-2, half).addcmul_(pairs.select(-2, 1 - half), sin.select(-2, half), value=sign)
        return rotated.flatten(-3).to(y.dtype)


LayerFactors = LowRank | InputScales | OutputScales | Rotations


def layer_factors(sizes: FactorSizes, saved: Sequence[Tensor], dtype: torch.dtype) -> LayerFactors:
    """The factors of a layer, in new memory.

    Args:
        sizes: of the layer.
        saved: what the adapter's file has of it.
        dtype: in which products with matrices are.
    """
    if sizes.method == "lora":
        (A, B), (scaling,) = saved, sizes.settings
        return LowRank(A.to(dtype, copy=True), float(scaling) * B.to(dtype))
    if sizes.method == "ia3":
        scales = saved[0].flatten().to(torch.float32, copy=True)
        return OutputScales(scales) if sizes.in_features is None else InputScales(scales)
    variant, group_size = sizes.settings
    # Values of cosine and sine, and of both outputs of a pair, are the same ones in some variants.
    shape = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}[str(variant)]
    theta, alpha = (
        values.float().view(-1, *shape, int(group_size) // 2).expand(-1, 2, 2, -1).unbind(1) for values in saved
    )
    return Rotations(alpha[0] * theta[0].cos(), alpha[1] * theta[1].sin())


def factor_bytes(sizes: FactorSizes, dtype: torch.dtype) -> int:
    """Bytes of what `layer_factors` gives."""
    features = (sizes.in_features or 0) + (sizes.out_features or 0)
    return features * {"lora": sizes.rank * dtype.itemsize, "ia3": 4, "road": 8}[sizes.method]


def rows_of(values: Float[Tensor, "B ..."], who: Tensor | None) -> Float[Tensor, "N ..."]:
    """Some rows of a batch; None: all."""
    return values if who is None else values.index_select(0, who)


def _for_tokens(factor: Float[Tensor, "*N ..."], values: Tensor, dimensions: int = 1) -> Tensor:
    """With the tokens' dimensions of values behind that of their rows."""
    tokens = values.dim() - 1 - dimensions
    return factor.view(len(factor), *(1,) * tokens, *factor.shape[1:])
