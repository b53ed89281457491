"""What serving needs of an adapter as one row of numbers: g - 1, scale and lambda_d of every layer, and its heads.

A factor row has the layers in the order of the content, each with `g - 1` (O), `g beta` (O) and lambda_d (R). The
magnitude itself never is in half precision: `g - 1` lies near zero and survives it. In half precision, scale and
lambda_d of a layer, of which only the product is used, are balanced by a power of two, so that neither is too small for
the dtype.

Dimensions: L layers, F values of a factor row, H of a head row, O out, R rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..factors import StackConstants, stacked_factors
from ..flat import with_zeros
from ..functional import Vectors
from ..peft.config import DVoRAConfig
from ..peft.content import Content, LayerSizes
from ..tensors import Float
from .served import ServedLayer, ServedModel
from .sources import AdapterValues

FORMAT_VERSION = 1
"""Of the order and the meaning of the values in a factor row."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """One adapter as a bank holds it."""

    row: Float[Tensor, "F"]
    heads: Float[Tensor, "H"]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.row.nbytes + self.heads.nbytes


class LayerPlace(NamedTuple):
    """Where a layer stands in a factor row."""

    start: int
    out_features: int
    rank: int

    @property
    def stop(self) -> int:
        """The first value behind it."""
        return self.start + sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Of `g - 1`, scale and lambda_d."""
        return self.out_features, self.out_features, self.rank


class FactorRows:
    """How adapters of one content become factor rows on one base model.

    Args:
        served: the layers and heads of the model.
        dtype: of the rows.
    """

    def __init__(self, served: ServedModel, dtype: torch.dtype) -> None:
        check_dtype(dtype)
        self.served, self.dtype = served, dtype
        self.places = _places(served.content.layers)
        self.width = self.places[-1].stop
        own = self._own_heads = served.head_values()
        self.head_dtype = next(iter(own.values())).dtype if own else dtype
        if any(value.dtype != self.head_dtype for value in own.values()):
            raise ValueError("model: its heads have several dtypes; cast them to one")
        self.base_heads = _joined(own, self.head_dtype)
        self.head_width = len(self.base_heads)
        self.stacks = _stacks(served.layers)
        """Layers of one shape, whose factors are made at once."""

    @classmethod
    def of_model(cls, model: nn.Module, config: DVoRAConfig, content: Content, dtype: torch.dtype) -> FactorRows:
        """Those of a base model.

        Args:
            model: without adapters.
            config, content: of an adapter.
            dtype: of the rows.

        Raises:
            TypeError, ValueError: no bank can serve the model (`ServedModel.of`).
        """
        return cls(ServedModel.of(model, config, content), dtype)

    @property
    def key(self) -> str:
        """Names what rows are made of besides the adapter's values: fingerprints of the base, content and dtypes."""
        content = self.served.content
        parts = [FORMAT_VERSION, content.digest, content.base, str(self.dtype), str(self.head_dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def identity(self, digest: str) -> str:
        """What names an adapter on this base.

        Args:
            digest: of its content and values.
        """
        return hashlib.sha256(json.dumps([self.served.content.base, digest]).encode()).hexdigest()[:32]

    def check(self, content: Content, allow_partial: bool = False) -> None:
        """Refuse an adapter of another content or base than the rows are for.

        Args:
            content: of the adapter.
            allow_partial: whether layers and heads may be missing, which are then the base's.

        Raises:
            ValueError: what differs.
        """
        own, names = self.served.content, _names(content)
        absent = sorted(_names(own) - names)
        if allow_partial:
            layers = tuple(layer for layer in own.layers if layer.name in names)
            own = own._replace(layers=layers, whole=tuple(each for each in own.whole if each.name in names))
        elif absent:
            raise ValueError(
                f"the adapter lacks {absent[0]}, and {len(absent)} of the bank's layers and heads in all; pass "
                " allow_partial=True to serve the base's there"
            )
        if difference := own.difference(content):
            raise ValueError(f"the adapter is another one than the bank is for: {difference}")

    @torch.no_grad()
    def of(self, values: AdapterValues) -> Factors:
        """The rows of one adapter, on the CPU; zeros, so the base's outputs, for layers that it does not have.

        Raises:
            ValueError: the dtype cannot hold them, or a file has other values besides, which are not the model's.
        """
        self.served.check_beside(values.beside)
        made = self._made(_by_layer(values))
        row = torch.zeros(self.width, dtype=torch.float32)
        strengths = dict(zip((layer.name for layer in values.content.layers), values.strengths, strict=True))
        for layer, place in zip(self.served.layers, self.places, strict=True):
            if layer.name in made:
                trained, lambda_d = made[layer.name]
                row[place.start : place.stop] = torch.cat([(strengths[layer.name] * trained).flatten(), lambda_d])
        whole = self.heads_of(values)
        if not whole.isfinite().all():
            raise ValueError(f"the adapter has values in its heads that {self.head_dtype}, the base's, cannot hold")
        return Factors(self._narrowed(row), whole)

    def heads_of(self, values: AdapterValues) -> Float[Tensor, "H"]:
        """The head row of an adapter; the base's where it has no head."""
        return _joined({**self._own_heads, **values.whole}, self.head_dtype)

    def base(self) -> Factors:
        """The rows of the base itself."""
        return Factors(torch.zeros(self.width, dtype=self.dtype), self.base_heads)

    def is_of_base(self, factors: Factors) -> bool:
        """Whether an adapter changes nothing."""
        changes = any(_changes(factors.row[place.start : place.stop], place.out_features) for place in self.places)
        return not changes and torch.equal(factors.heads, self.base_heads)

    def _made(self, vectors: Mapping[str, Vectors]) -> dict[str, tuple[Tensor, Tensor]]:
        """`g - 1` and scale as (2, O), and lambda_d, of every layer that has vectors."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for stack in self.stacks:
            layers = [layer for layer in stack if layer.name in vectors]
            if not layers:
                continue
            device = self.served.device
            own = [with_zeros(Vectors(*(v.to(device) for v in vectors[layer.name]))) for layer in layers]
            stacked = Vectors(*(torch.stack(of_kind)[:, None] for of_kind in zip(*own, strict=True)))
            constants = StackConstants.of([layer.refreshed() for layer in layers])
            stacked = stacked.to(constants.w.dtype)
            gain_minus_one, scale, _ = stacked_factors(stacked, constants)
            trained = torch.cat([gain_minus_one, scale], 1).cpu()
            names = [layer.name for layer in layers]
            found |= zip(names, zip(trained, stacked.lambda_d[:, 0].cpu(), strict=True), strict=True)
        return found

    def _narrowed(self, row: Float[Tensor, "F"]) -> Float[Tensor, "F"]:
        """The row in the bank's dtype."""
        if self.dtype != torch.float32:
            for place in self.places:
                _balance(row[place.start + place.out_features : place.stop], place)
        narrow = row.to(self.dtype)
        if not narrow.isfinite().all():
            raise ValueError(
                f"the adapter has factors up to {float(row.abs().max()):.3g}, which {self.dtype} cannot hold; make the "
                "bank with dtype=torch.float32, or look whether its training diverged"
            )
        return narrow


def _balance(parts: Float[Tensor, "OR"], place: LayerPlace) -> None:
    """Make the largest scale and the largest lambda_d of one layer alike, by a power of two, which rounds nothing."""
    scale, lambda_d = parts[: place.out_features], parts[place.out_features :]
    if not (place.rank and scale.any() and lambda_d.any()):
        return
    exponent = torch.round((lambda_d.abs().max().log2() - scale.abs().max().log2()) / 2)
    scale.mul_(torch.exp2(exponent))
    lambda_d.mul_(torch.exp2(-exponent))


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that factor rows cannot have.

    Raises:
        ValueError: it is one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def _changes(parts: Float[Tensor, "OOR"], out_features: int) -> bool:
    gain_minus_one, scale, lambda_d = parts.tensor_split((out_features, 2 * out_features))
    return bool(gain_minus_one.any() or (scale.any() and lambda_d.any()))


def _names(content: Content) -> set[str]:
    return {layer.name for layer in content.layers} | {part.name for part in content.whole}


def _places(layers: Sequence[LayerSizes]) -> tuple[LayerPlace, ...]:
    places, start = [], 0
    for layer in layers:
        places.append(LayerPlace(start, layer.out_features, layer.rank))
        start = places[-1].stop
    return tuple(places)


def _stacks(layers: Sequence[ServedLayer]) -> list[list[ServedLayer]]:
    stacks: dict[object, list[ServedLayer]] = {}
    for layer in layers:
        stacks.setdefault(layer.adapted.stack_key, []).append(layer)
    return list(stacks.values())


def _by_layer(values: AdapterValues) -> dict[str, Vectors]:
    layers = values.content.layers
    parts = iter(values.vector.split([length for layer in layers for length in layer.lengths]))
    return {layer.name: Vectors(next(parts), next(parts), next(parts)) for layer in layers}


def _joined(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Float[Tensor, "H"]:
    """Heads as one head row, on the CPU."""
    flat = [tensor.detach().reshape(-1).to("cpu", dtype) for tensor in tensors.values()]
    return torch.cat(flat) if flat else torch.empty(0, dtype=dtype)
