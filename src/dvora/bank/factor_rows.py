"""An adapter as serving needs it: one row of numbers, `g - 1`, scale and lambda_d of every layer, and its heads.

A factor row has the layers in the order of the content, each with `g - 1` (O), `g beta` (O) and lambda_d (K). The
magnitude itself never is in half precision: `g - 1` lies near zero and survives it. In half precision, scale and
lambda_d of a layer, of which only the product is used, are balanced by a power of two, so that neither is too small for
the dtype.

Dimensions: N adapters, S values of a vector, F values of a factor row, O out, K values of lambda_d.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ..adapter_file.content import LayerSizes, vector_digest
from ..adapter_file.values import AdapterValues, is_finite
from ..factors import factor_rows
from ..rows.gathered import Held, LayerPlace
from ..rows.low_rank import LowRank
from ..tensors import Float
from .served import ServedModel
from .slots import AdapterRow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FactorRows:
    """How adapters become factor rows on one base model.

    Args:
        served: the layers and heads of the model.
        dtype: of the rows: float32, or half precision.
    """

    def __init__(self, served: ServedModel, dtype: torch.dtype) -> None:
        self.served, self.dtype = served, dtype
        self.places: list[LayerPlace] = []
        for layer in served.content.layers:
            start = self.places[-1].stop if self.places else 0
            self.places.append(LayerPlace(start, layer.out_features, layer.lengths[2]))
        self.width = self.places[-1].stop if self.places else 0
        self.row_lengths = [length for place in self.places for length in place.lengths]
        self._segments = torch.tensor(self.row_lengths)
        self.lengths = [length for layer in served.content.layers for length in layer.lengths]
        self._base = json.dumps(served.content.base)
        starts = [layer.adapted.initial_vectors(served.config.d_initial) for layer in served.layers]
        parts = [part for vectors in starts for part in vectors]
        starting = [part.flatten()[:n].float().cpu() for part, n in zip(parts, self.lengths, strict=True)]
        self.start = torch.cat([torch.empty(0), *starting])
        """The vector of the base, (S,)."""

    def identity(self, values: AdapterValues) -> str:
        """What names an adapter on this base, whatever it is called."""
        # Files of LoRA do not say of which base they are.
        base = self._base if values.content.layers else "[]"
        return vector_digest(f'[{base}, "{values.digest}"]')

    def base(self) -> AdapterRow:
        """The row of the base itself."""
        return self._row(torch.zeros(self.width, dtype=self.dtype), self.served.own_heads)

    def is_of_base(self, row: AdapterRow) -> bool:
        """Whether an adapter changes nothing."""
        for place in self.places:
            if self._acts(row.factors, place):
                return False
        own_heads = self.served.own_heads
        return not row.held.factors and all(torch.equal(row.held.heads[name], own_heads[name]) for name in own_heads)

    @torch.no_grad()
    def of(self, adapters: Sequence[AdapterValues]) -> Float[Tensor, "N F"]:
        """The factor rows of adapters with their strengths, in the bank's dtype, on the CPU."""
        if not self.places:
            return torch.zeros(len(adapters), 0, dtype=self.dtype)
        vectors = torch.stack([self.vector(values) for values in adapters])
        factors = self.of_vectors(vectors.to(self.served.device)).to("cpu", torch.float32)
        for values, row in zip(adapters, factors, strict=True):
            if len(values.strengths) < len(self.places) or set(values.strengths) != {1.0}:
                strengths = dict(zip((layer.name for layer in values.content.layers), values.strengths, strict=True))
                # Layers that it does not have are the base's.
                for layer, place in zip(self.served.content.layers, self.places, strict=True):
                    row[place.start : place.stop - place.lambda_d_size] *= strengths.get(layer.name, 0.0)
        return factors if self.dtype == torch.float32 else balanced(factors, self._segments).to(self.dtype)

    def row(self, values: AdapterValues, factors: Float[Tensor, "F"]) -> AdapterRow:
        """An adapter as the bank holds it.

        Args:
            values: of the adapter.
            factors: its row in what `of` has made, of which a copy is kept: not the rows of others with it.

        Raises:
            ValueError: the dtype cannot hold them, or a file has other values besides, which are not the model's.
        """
        if values.beside:
            self.served.check_beside(values.beside)
        if not is_finite(factors):
            raise ValueError(
                f"the adapter has factors that {self.dtype} cannot hold; make the bank with dtype=torch.float32, or "
                "look whether its training diverged"
            )
        return self._row(factors.clone(), self.served.heads_of(values.whole), self._low_rank(values))

    def _row(
        self,
        factors: Float[Tensor, "F"],
        heads: Mapping[str, Tensor],
        low_rank: Mapping[str, LowRank] = MappingProxyType({}),
    ) -> AdapterRow:
        changed = [layer for layer, place in enumerate(self.places) if self._acts(factors, place)]
        layers = self.served.layers
        modules = [*(layers[layer].module for layer in changed), *(self.served.linears[name] for name in low_rank)]
        return AdapterRow(
            factors,
            # Most adapters change all, and there may be thousands of them.
            Held(heads, self.served.first_blocks(modules), None if len(changed) == len(layers) else changed, low_rank),
        )

    def _low_rank(self, values: AdapterValues) -> dict[str, LowRank]:
        """The factors of an adapter of LoRA as its layers compute with them."""
        factors, dtype = {}, self.served.dtype
        for sizes in values.content.factors:
            factors[sizes.name] = of_layer = LowRank.of_saved(sizes, values.factors[sizes.name], dtype)
            if not all(map(is_finite, of_layer)):
                raise ValueError(f"{sizes.name} has factors that {dtype} cannot hold")
        return factors

    @staticmethod
    def _acts(factors: Float[Tensor, "F"], place: LayerPlace) -> bool:
        """Whether an adapter changes a layer."""
        gain_minus_one, scale, lambda_d = factors[place.start : place.stop].split(place.lengths)
        return bool(gain_minus_one.any() or (scale.any() and lambda_d.any()))

    def vector(self, values: AdapterValues) -> Float[Tensor, "S"]:
        """The vectors of an adapter; the base's for layers that it does not have."""
        present, layers = values.content.layers, self.served.content.layers
        if present == layers:
            return values.vector
        if not present:
            return self.start
        parts = dict(zip((layer.name for layer in layers), self._by_layer(self.start, layers), strict=True))
        parts |= zip((layer.name for layer in present), self._by_layer(values.vector, present), strict=True)
        return torch.cat([parts[layer.name] for layer in layers])

    def of_vectors(self, vectors: Float[Tensor, "N S"]) -> Float[Tensor, "N F"]:
        """The factor rows of N adapters, in the dtype of the constants, with a graph where one is recorded.

        The base is as it was when it was hooked: a batch is refused where it is not.
        """
        return factor_rows([layer.adapted for layer in self.served.layers], vectors)

    @staticmethod
    def _by_layer(vector: Float[Tensor, "S"], layers: Sequence[LayerSizes]) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = vector.split([sum(layer.lengths) for layer in layers])
        return parts


def balanced(rows: Float[Tensor, "N F"], lengths: Tensor) -> Float[Tensor, "N F"]:
    """The largest scale and the largest lambda_d of each layer made alike, by a power of two, which rounds nothing.

    Args:
        rows: `g - 1`, scale and lambda_d of every layer.
        lengths: of these, three a layer.
    """
    lengths = lengths.repeat(len(rows))
    largest = torch.segment_reduce(rows.flatten().abs(), "max", lengths=lengths)
    _, scale, lambda_d = largest.view(-1, 3).unbind(1)
    exponent = torch.where((scale > 0) & (lambda_d > 0), torch.round((lambda_d.log2() - scale.log2()) / 2), 0.0)
    factor = torch.stack([torch.zeros_like(exponent), exponent, -exponent], 1).exp2().flatten()
    return rows * factor.repeat_interleave(lengths, output_size=rows.numel()).view_as(rows)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that factor rows cannot have.

    Raises:
        ValueError: it is one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
