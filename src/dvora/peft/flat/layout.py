"""Layout: where an adapter's values stand in one flat float32 vector, and the ways between vectors and adapters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import FAR
from ...functional import Vectors
from ...tensors import Float, is_dtensor
from ..adapter_folder import VECTOR_PREFIX
from ..layer import check_unmerged
from ..restoring import on_failure, values_as_they_are
from ..state.checked_values import check_layer_factors, check_whole
from .content import FORMAT_VERSION, Content, LayerSizes, ModelAdapter, SavedWhole, Settings, tensors_of
from .row_factors import LayerFactors, factors_of_layers, with_zeros

Source = nn.Module | str | os.PathLike[str]
"""A model with the adapter, or the folder of a saved one."""
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values float32 holds exactly."""
_SHOWN = 4
"""Sizes of layers, where a layout is printed."""


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
    digest: str = field(init=False)
    """A short hash of everything but the base's fingerprints: send it along with a vector."""
    size: int = field(init=False)
    """How many values a vector has."""

    def __post_init__(self) -> None:
        if not self.content.layers:
            raise ValueError(f"source: adapter {self.adapter_name!r} has no vectors of any layer; it is damaged")
        object.__setattr__(self, "digest", self.content.digest)
        object.__setattr__(self, "size", sum(self._lengths()))

    @classmethod
    def of(cls, source: Source, adapter_name: str = "default") -> Layout:
        """The layout of an adapter in a model, or of a saved one, of which only the headers are read.

        Args:
            source: a model, wrapped or not, or the folder of an adapter.
            adapter_name: of the adapter in the model; of a folder, the name it is to have in models.

        Raises:
            TypeError, ValueError: there is no DVoRA adapter, or it is damaged or of another format.
        """
        return cls(_content(source, adapter_name), adapter_name)

    @torch.no_grad()
    def to_vector(self, source: Source) -> Float[Tensor, "S"]:
        """The values of an adapter as a new vector: on its own device from a model, on the CPU from a folder.

        Raises:
            TypeError, ValueError: the adapter is of another layout, its values are not all in this process, or float32
                would round some of them.
        """
        if isinstance(source, nn.Module):
            tensors = _at_hand(self._adapter_in(source))
        else:
            self._check_same(_content(source, self.adapter_name), str(source))
            tensors = tensors_of(Path(source))
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
        """Copy a vector into an adapter of a model: all of it, or after an error or an interruption nothing.

        Parameters stay the same objects, so optimizers and compiled models keep working; gradients are not touched.
        What is saved whole in half precision (a head of such a model) is rounded to it.

        Raises:
            TypeError, ValueError: the vector or the model is not of this layout, the adapter is merged, or the values
                would give outputs that are not finite; nothing is written then.
        """
        self._check_vector(vector, dimensions=1)
        adapter = self._adapter_in(model)
        check_unmerged(model, self.adapter_name)
        own = _at_hand(adapter)
        self._check_far(vector, adapter)
        tensors = list(own.values())
        # In one piece: most models are on one device.
        parts = vector.detach().to(tensors[0].device).split(self._lengths())
        values = [
            part.view(tensor.shape).to(tensor.device, tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)
        ]
        _check_writable(own, values)
        with on_failure(values_as_they_are(tensors)):
            torch._foreach_copy_(tensors, values)

    def factors(self, model: nn.Module, vectors: Float[Tensor, "*N S"]) -> dict[str, LayerFactors]:
        """What serving needs of every layer, by name, for one vector or a batch: as its layers would use it.

        Nothing of the model is changed. The results are views of one tensor for each shape of layers, without
        gradients; those of a batch (N, size) have N rows. They include the strength that the adapter has in the model.

        Raises:
            TypeError, ValueError: vectors or model are not of this layout, factors would not be finite, adapters are
                merged, or a weight is sharded.
        """
        self._check_vector(vectors, dimensions=2)
        layers = self._adapter_in(model).layers
        for layer in layers.values():
            if layer.merged:
                raise ValueError(
                    f"model: adapters are merged into {layer.name} ({', '.join(layer.merged_adapters)}), and factors "
                    "are of its own weight; call unmerge_adapter first"
                )
            if (device := layer.adapted(self.adapter_name).w.device) != vectors.device:
                raise ValueError(
                    f"vector is on {vectors.device}, and {layer.name} of the model on {device}; pass "
                    f"vector.to({str(device)!r})"
                )
        made = factors_of_layers(layers, self.adapter_name, self.views(torch.atleast_2d(vectors)))
        if vectors.abs().max() > FAR:
            _check_finite(made)
        if vectors.dim() == 2:
            return made
        return {name: LayerFactors(*(factor[0] for factor in of_layer)) for name, of_layer in made.items()}

    def views(self, vector: Float[Tensor, "*N S"]) -> dict[str, Vectors]:
        """The three vectors of every layer, by name, as views: writing into them writes into the vector.

        lambda_b and lambda_d are empty for a layer that has the magnitude only.

        Raises:
            TypeError, ValueError: it is no tensor, or has another size.
        """
        self._check_size(vector, dimensions=2)
        parts = iter(vector.split(self._lengths(), dim=-1))
        empty = vector[..., :0]
        return {
            layer.name: Vectors(*(next(parts) if length else empty for length in layer.lengths))
            for layer in self.content.layers
        }

    def to_dict(self) -> dict[str, Any]:
        """The layout as what JSON has types for."""
        return {
            "format_version": FORMAT_VERSION,
            "digest": self.digest,
            "settings": self.content.settings._asdict(),
            "layers": [list(layer) for layer in self.content.layers],
            "whole": [[each.name, list(each.shape)] for each in self.content.whole],
            "base": {name: list(fingerprint) for name, fingerprint in self.content.base},
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], adapter_name: str = "default") -> Layout:
        """The layout that `to_dict` has written.

        Raises:
            ValueError: it is of another format version, or damaged.
        """
        if not isinstance(settings, Mapping) or settings.get("format_version") != FORMAT_VERSION:
            version = settings.get("format_version") if isinstance(settings, Mapping) else None
            raise ValueError(
                f"settings: a layout of format_version {version!r:.100}, expected {FORMAT_VERSION}; make it again with "
                "Layout.of, with this version of dvora on both sides"
            )
        try:
            layout = cls(_content_from(settings), adapter_name)
            intact = layout.digest == settings["digest"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"settings: no layout can be read from it ({error!r:.200}); make it again") from error
        if not intact:
            raise ValueError(
                f"settings: its digest is {settings['digest']!r:.100} and that of its entries {layout.digest!r}; it "
                "was changed on the way, make it again with Layout.of"
            )
        return layout

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        return self.content.difference(other.content) is None

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        sizes = Counter((layer.out_features, layer.rank) for layer in self.content.layers)
        shown = [f"{count} of {out:,} x r{rank}" for (out, rank), count in sizes.most_common(_SHOWN)]
        more = [f"{len(sizes) - _SHOWN} other sizes"] if len(sizes) > _SHOWN else []
        whole = f"; {len(self.content.whole)} saved whole" if self.content.whole else ""
        return f"Layout({self.digest}: {self.size:,} values; layers: {', '.join(shown + more)}{whole})"

    def _lengths(self) -> list[int]:
        """Of all parts of a vector, without those that a layer does not have."""
        vectors = [length for layer in self.content.layers for length in layer.lengths if length]
        return vectors + [prod(each.shape) for each in self.content.whole]

    def _adapter_in(self, model: nn.Module) -> ModelAdapter:
        """The adapter in a model, if the layout is its."""
        adapter = ModelAdapter.of(model, self.adapter_name)
        self._check_same(adapter.content(), "the model")
        return adapter

    def _check_same(self, content: Content, of: str) -> None:
        """Refuse another adapter than the layout is of, or another base."""
        if difference := self.content.difference(content):
            raise ValueError(
                f"this layout ({self.digest}) is not that of adapter {self.adapter_name!r} of {of} ({content.digest}): "
                f"{difference}. Use Layout.of(...) of that adapter, and vectors that were made with an equal layout"
            )

    def _check_size(self, vector: Tensor, dimensions: int) -> None:
        if not isinstance(vector, Tensor):
            raise TypeError(f"vector must be a tensor of {self.size} values, got {type(vector).__name__}")
        if not 1 <= vector.dim() <= dimensions or vector.shape[-1] != self.size or not vector.numel():
            batch = f" or (N, {self.size})" if dimensions == 2 else ""
            raise ValueError(
                f"vector has shape {tuple(vector.shape)}, expected ({self.size},){batch} as {self!r} says; was it made "
                "with another layout?"
            )

    def _check_vector(self, vector: Tensor, dimensions: int) -> None:
        """Refuse what is not one vector, or not some, of finite float32 values."""
        self._check_size(vector, dimensions)
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
            raise ValueError(
                f"vector has values that are not finite, the first at index {at} ({self._name_at(at)}); training has "
                "diverged or the vector was damaged, so use an earlier one"
            )

    def _check_far(self, vector: Tensor, adapter: ModelAdapter) -> None:
        """Refuse finite values that give some row no finite factors."""
        if vector.abs().max() <= FAR:
            return
        views = self.views(vector)
        for name, layer in adapter.layers.items():
            check_layer_factors(layer, self.adapter_name, with_zeros(views[name]))

    def _name_at(self, index: int) -> str:
        """What an entry belongs to."""
        names = [
            f"{vector} of {layer.name}"
            for layer in self.content.layers
            for vector, length in zip(Vectors._fields, layer.lengths, strict=True)
            if length
        ]
        names += [each.name for each in self.content.whole]
        return next(name for name, end in zip(names, accumulate(self._lengths()), strict=True) if index < end)


def _content(source: Source, adapter_name: str) -> Content:
    if isinstance(source, nn.Module):
        return ModelAdapter.of(source, adapter_name).content()
    if isinstance(source, str | os.PathLike):
        return Content.of_folder(Path(source))
    raise TypeError(f"source must be a model or the folder of an adapter, got {type(source).__name__}")


def _content_from(settings: Mapping[str, Any]) -> Content:
    common = dict(settings["settings"])
    common["tokens"] = tuple((name, tuple(indices)) for name, indices in common["tokens"])
    return Content(
        Settings(**common),
        tuple(LayerSizes(*layer) for layer in settings["layers"]),
        tuple(SavedWhole(name, tuple(shape)) for name, shape in settings["whole"]),
        tuple((name, tuple(fingerprint)) for name, fingerprint in settings["base"].items()),
    )


def _at_hand(adapter: ModelAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter in a model, if this process has all their values."""
    tensors = adapter.tensors()
    check_whole(tensors)
    if absent := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"model: {absent[0]} is on the meta device and has no values yet; load the adapter first")
    return tensors


def _check_finite(made: Mapping[str, LayerFactors]) -> None:
    """Refuse factors that are not finite."""
    for name, factors in made.items():
        if not all(factor.isfinite().all() for factor in factors):
            raise ValueError(
                f"vector gives {name} factors that are not finite: magnitude, lambda_b and lambda_d are too large; "
                "training has diverged or the vector was damaged, so use an earlier one"
            )


def _check_writable(own: Mapping[str, Tensor], values: Sequence[Tensor]) -> None:
    """Refuse parameters that could not hold the values, and two values for one tensor."""
    written: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for (name, tensor), value in zip(own.items(), values, strict=True):
        is_vector = VECTOR_PREFIX in name
        if tensor.dtype != torch.float32 and (is_vector or tensor.dtype not in _NARROW):
            raise TypeError(
                f"model: {name} is {tensor.dtype}, expected torch.float32, in which the layer keeps it unless it was "
                "cast through parameter.data or is on a float64 base; nothing was written"
            )
        if tensor.dtype != torch.float32 and not value.isfinite().all():
            raise ValueError(f"vector has values for {name} that are too large for its dtype, {tensor.dtype}")
        place = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device
        first, other = written.setdefault(place, (name, value))
        if other is not value and not torch.equal(other, value):
            raise ValueError(
                f"vector has different values for {first} and {name}, which are one tensor in the model (tied); give "
                "both the same"
            )
