"""One flat float32 vector is the adapter: where each value stands, and the ways there and back.

Dimensions: N vectors, S values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file.content import Content
from .adapter_file.values import of_dvora
from .adapter_file.values_file import VECTOR_PREFIX
from .checks import FAR
from .functional import Vectors
from .peft.layer import check_unmerged
from .peft.model_adapter import ModelAdapter, ModelOrFolder, content_of
from .peft.restoring import keep_values, restored_on_error
from .peft.saving import check_layer_factors
from .tensors import Float, is_dtensor

__all__ = ["Layout"]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values float32 holds exactly."""


@dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Where each value of an adapter stands in one flat float32 vector; made by `Layout.of`.

    Layers come in the order of their names, each with magnitude, lambda_b and lambda_d; then whatever else the adapter
    trains and saves whole (heads, biases, tokens). Two layouts are equal if a vector of one adapter means the same in
    the other; that of a model equals that of its saved folder. The name of the adapter is no part of that.

    Args:
        content: what the adapter consists of.
        adapter_name: of the adapter in the models that the layout is used with.
    """

    content: Content
    adapter_name: str = "default"

    def __post_init__(self) -> None:
        if not self.content.layers:
            raise ValueError(f"source: adapter {self.adapter_name!r} has no vectors of any layer; it is damaged")

    @cached_property
    def digest(self) -> str:
        """A short hash of everything but the base's fingerprints: send it along with a vector."""
        return self.content.digest

    @cached_property
    def size(self) -> int:
        """How many values a vector has."""
        return sum(self._parts.values())

    @classmethod
    def of(cls, source: ModelOrFolder, adapter_name: str = "default") -> Layout:
        """The layout of an adapter in a model, or of a saved one, of which only the headers are read.

        Args:
            source: a model, wrapped or not, or the folder of an adapter or of a run of `dvora train`.
            adapter_name: of the adapter in the model; of a folder, the name it is to have in models.

        Raises:
            TypeError, ValueError: there is no DVoRA adapter, or it is damaged or of another format.
        """
        return cls(content_of(source, adapter_name), adapter_name)

    @torch.no_grad()
    def to_vector(self, source: ModelOrFolder) -> Float[Tensor, "S"]:
        """The values of an adapter as a new vector: on its own device from a model, on the CPU from a folder.

        Raises:
            TypeError, ValueError: the adapter is of another layout, its values are not all in this process, or float32
                would round some of them.
        """
        if isinstance(source, nn.Module):
            tensors = self._adapter_in(source).tensors()
        else:
            self._check_same((folder := of_dvora(Path(source))).content, source)
            tensors = folder.tensors()
        for name, tensor in tensors.items():
            if tensor.dtype not in _NARROW:
                raise TypeError(
                    f"source: {name} is {tensor.dtype}, and a vector is float32, which would round it. Adapters "
                    "on bases of float32 and below have flat vectors; keep this one in files"
                )
        device = next(iter(tensors.values())).device
        return torch.cat([tensor.reshape(-1).to(device, torch.float32) for tensor in tensors.values()])

    @torch.no_grad()
    def from_vector(self, vector: Float[Tensor, "S"], model: nn.Module) -> None:
        """Copy a vector into an adapter of a model: all of it, or after an error nothing.

        Parameters stay the same objects, so optimizers and compiled models keep working; gradients are not touched.
        What is saved whole in half precision (a head of such a model) is rounded to it.

        Raises:
            TypeError, ValueError: the vector or the model is not of this layout, the adapter is merged, or the values
                would give outputs that are not finite; nothing is written then.
        """
        self.check_vector(vector)
        adapter = self._adapter_in(model)
        check_unmerged(model, self.adapter_name)
        by_name = adapter.tensors()
        if vector.abs().max() > FAR:
            for name, views in self.views(vector).items():
                check_layer_factors(adapter.layers[name], self.adapter_name, _with_zeros(views))
        tensors = list(by_name.values())
        # In one piece: most models are on one device.
        parts = vector.detach().to(tensors[0].device).split(list(self._parts.values()))
        values = [part.view(old.shape).to(old.device, old.dtype) for part, old in zip(parts, tensors, strict=True)]
        _check_writable(by_name, values)
        with restored_on_error() as undo:
            keep_values(undo, tensors)
            torch._foreach_copy_(tensors, values)

    def check_vector(self, vector: Float[Tensor, "S"]) -> None:
        """Refuse what is no vector of this layout with finite values.

        Args:
            vector: float32, (S,).

        Raises:
            TypeError, ValueError: it is of another dtype or size, not all in this process, or not finite.
        """
        self._check_size(vector)
        if vector.dtype != torch.float32:
            raise TypeError(
                f"vector is {vector.dtype}, expected torch.float32: half precision rounds a magnitude by up to 0.4 %. "
                "Keep vectors in float32 where they are made, sent and averaged"
            )
        if vector.is_meta or is_dtensor(vector) or vector.layout != torch.strided:
            raise ValueError(
                f"vector is a {type(vector).__name__} of layout {vector.layout} on {vector.device}, expected a dense "
                "tensor with all its values in this process; gather or load them first"
            )
        if not vector.isfinite().all():
            at = int((~vector.isfinite()).nonzero()[0, -1])
            part = [name for name, length in self._parts.items() for _ in range(length)][at]
            raise ValueError(f"vector has values that are not finite, the first at index {at} ({part}); use another")

    def views(self, vector: Float[Tensor, "*N S"]) -> dict[str, Vectors]:
        """The three vectors of every layer, by name, as views: writing into them writes into the vector.

        lambda_b and lambda_d are empty for a layer that has the magnitude only.

        Raises:
            TypeError, ValueError: it is no tensor, or has another size.
        """
        self._check_size(vector, dimensions=2)
        parts = iter(vector.split(list(self._parts.values()), dim=-1))
        empty = vector[..., :0]
        return {
            layer.name: Vectors(*(next(parts) if length else empty for length in layer.lengths))
            for layer in self.content.layers
        }

    def to_dict(self) -> dict[str, Any]:
        """The layout as what JSON has types for."""
        return self.content.to_dict()

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], adapter_name: str = "default") -> Layout:
        """The layout that `to_dict` has written.

        Raises:
            ValueError: it is of another format version, or damaged.
        """
        return cls(Content.from_dict(settings), adapter_name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.content.difference(other.content) is None

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        sizes = Counter(
            f"{layer.out_features:,} x r{layer.rank}" + (f" in {layer.groups} groups" if layer.groups > 1 else "")
            for layer in self.content.layers
        ).most_common()
        layers = ", ".join(f"{count} of {size}" for size, count in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
        whole = f"; {len(self.content.whole)} saved whole" if self.content.whole else ""
        return f"Layout({self.digest}: {self.size:,} values; layers: {layers}{whole})"

    @cached_property
    def _parts(self) -> dict[str, int]:
        """The lengths of all parts of a vector, in their order, by what they are."""
        vectors = {
            f"{vector} of {layer.name}": length
            for layer in self.content.layers
            for vector, length in zip(Vectors._fields, layer.lengths, strict=True)
            if length
        }
        return vectors | {whole.name: prod(whole.shape) for whole in self.content.whole}

    def _adapter_in(self, model: nn.Module) -> ModelAdapter:
        """The adapter in a model, if the layout is its."""
        adapter = ModelAdapter.of(model, self.adapter_name)
        self._check_same(adapter.content(), "the model")
        return adapter

    def _check_same(self, content: Content, of: object) -> None:
        """Refuse another adapter than the layout is of, or another base."""
        if difference := self.content.difference(content):
            raise ValueError(
                f"this layout ({self.digest}) is not that of adapter {self.adapter_name!r} of {of} ({content.digest}): "
                f"{difference}. Use Layout.of(...) of that adapter, and vectors that were made with an equal layout"
            )

    def _check_size(self, vector: Tensor, dimensions: int = 1) -> None:
        if not isinstance(vector, Tensor):
            raise TypeError(f"vector must be a tensor of {self.size} values, got {type(vector).__name__}")
        if not 1 <= vector.dim() <= dimensions or vector.shape[-1] != self.size or not vector.numel():
            batch = f" or (N, {self.size})" if dimensions == 2 else ""
            raise ValueError(f"vector has shape {tuple(vector.shape)}, expected ({self.size},){batch} as {self!r} says")


def _with_zeros(vectors: Vectors) -> Vectors:
    """The vectors with zeros for a lambda_b that the layer does not have."""
    magnitude, lambda_b, lambda_d = vectors
    return vectors if lambda_b.shape == magnitude.shape else Vectors(magnitude, torch.zeros_like(magnitude), lambda_d)


def _check_writable(tensors: Mapping[str, Tensor], values: Sequence[Tensor]) -> None:
    """Refuse parameters that could not hold the values, and two values for one tensor."""
    written: dict[object, tuple[str, Tensor]] = {}
    for (name, tensor), value in zip(tensors.items(), values, strict=True):
        if tensor.dtype != torch.float32 and (VECTOR_PREFIX in name or tensor.dtype not in _NARROW):
            raise TypeError(
                f"model: {name} is {tensor.dtype}, expected torch.float32, in which the layer keeps it unless it was "
                "cast through parameter.data or is on a float64 base; nothing was written"
            )
        if not value.isfinite().all():
            raise ValueError(f"vector has values for {name} that are too large for its dtype, {tensor.dtype}")
        first, other = written.setdefault((tensor.data_ptr(), tensor.shape, tensor.device), (name, value))
        if not torch.equal(other, value):
            raise ValueError(f"vector has different values for {first} and {name}, which are one tensor (tied)")
