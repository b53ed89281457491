"""What a model should be: values in float64 that the histories keep themselves, and the dense method on them.

Nothing here asks the library for anything but the shared matrices of a seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from dvora import SharedProjections
from tests.histories.subjects import BASE, NAMES, VECTORS, Settings, combined
from tests.reference import DenseDVoRA


class Gradient(NamedTuple):
    """What a gradient should be, and the size that deviations are measured by."""

    value: Tensor
    size: float


@dataclass
class LayerShadow:
    """One adapted layer: its values, and the weight that was merged into its base, if any is."""

    values: dict[str, Tensor]
    """weight, bias if there is one, magnitude, lambda_b, lambda_d."""
    A: Tensor
    B: Tensor
    settings: Settings
    strength: float
    merged: Tensor | None = None

    def dense(self) -> DenseDVoRA:
        """The reference, with parameters of its own."""
        values = {"bias": None, **self.values}
        options = {"direction": self.settings.direction, "detach_norm": self.settings.detach_norm}
        return DenseDVoRA(**values, A=self.A, B=self.B, scaling=self.settings.scaling, **options)

    def weight_of(self, dense: DenseDVoRA) -> Tensor:
        """`W + s (W' - W)`, or what was merged."""
        if self.merged is not None:
            return self.merged
        return dense.weight + self.strength * (dense.merged_weight() - dense.weight)


@dataclass
class Shadow:
    """A whole model."""

    layers: dict[str, LayerShadow]
    dtype: torch.dtype
    trained: set[str]
    """Names like "first.magnitude"."""
    gradients: dict[str, Gradient] = field(default_factory=dict)
    """What is in `.grad`, and how far it may be off."""
    training: bool = True
    merged_in: torch.dtype | None = None
    """The coarsest dtype that the merged weights have had."""

    @classmethod
    def drawn(cls, settings: Settings, rng: np.random.Generator) -> Shadow:
        """A base and trained vectors."""
        shared = SharedProjections(settings.seed, settings.kind)
        layers = {}
        for name in NAMES:
            in_features, out_features = settings.sizes[name]
            rank = settings.rank
            A = shared.A(rank, in_features, torch.float64).clone()
            B = shared.B(rank, out_features, torch.float64).clone()
            layers[name] = LayerShadow({}, A, B, settings, settings.strength)
        vectors = {f"{name}.{vector}" for name in NAMES for vector in VECTORS}
        shadow = cls(layers, settings.dtype, vectors)
        for name in NAMES:
            shadow.layers[name].values = shadow.other_base(name, rng)
            shadow.layers[name].values |= shadow.other_vectors(name, rng)
            if not settings.freeze_base:
                shadow.trained |= {f"{name}.{value}" for value in BASE if value in shadow.layers[name].values}
        return shadow

    def copy(self) -> Shadow:
        """One that goes its own way."""
        return copy.deepcopy(self)

    @property
    def is_merged(self) -> bool:
        """Whether anything is merged."""
        return any(layer.merged is not None for layer in self.layers.values())

    @property
    def vector_dtype(self) -> torch.dtype:
        """Vectors never fall below float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def dtype_of(self, value: str) -> torch.dtype:
        """That of a vector, or of a weight or bias."""
        return self.vector_dtype if value.rpartition(".")[2] in VECTORS else self.dtype

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype that bounds how exact outputs can be."""
        held = [self.dtype, *([self.merged_in] if self.merged_in is not None else [])]
        return max(held, key=lambda dtype: torch.finfo(dtype).eps)

    def names(self) -> list[str]:
        """Of all values."""
        return [f"{name}.{value}" for name, layer in self.layers.items() for value in layer.values]

    def __getitem__(self, name: str) -> Tensor:
        layer, _, value = name.partition(".")
        return self.layers[layer].values[value]

    def __setitem__(self, name: str, new: Tensor) -> None:
        layer, _, value = name.partition(".")
        assert new.shape == self.layers[layer].values[value].shape, name
        self.layers[layer].values[value] = new.detach().double().clone()

    def other_base(self, name: str, rng: np.random.Generator) -> dict[str, Tensor]:
        """Another weight and bias for a layer, as they are after rounding to the model's dtype."""
        settings = self.layers[name].settings
        in_features, out_features = settings.sizes[name]
        weight = rng.normal(size=(out_features, in_features)) / in_features**0.5
        weight *= 0.5 + abs(rng.normal(size=(out_features, 1)))
        if settings.row == "zero":
            weight[1] = 0
        if settings.row == "tiny":
            weight[1] *= 1e-6
        made = {"weight": weight}
        if settings.bias:
            made["bias"] = 0.5 * rng.normal(size=out_features)
        return {key: torch.from_numpy(value).to(self.dtype).double() for key, value in made.items()}

    def other_vectors(self, name: str, rng: np.random.Generator) -> dict[str, Tensor]:
        """Vectors that turn rows by tens of degrees and change their norms by tens of percent."""
        rank, w = self.layers[name].settings.rank, self.layers[name].values["weight"].norm(dim=1).numpy()
        w, out_features = np.where(w == 0, 1.0, w), len(w)
        made = {
            "magnitude": w * (1 + 0.2 * rng.normal(size=out_features)),
            "lambda_b": rng.normal(size=out_features),
            "lambda_d": 0.2 + 0.3 * rng.normal(size=rank),
        }
        return {key: torch.from_numpy(value).to(self.vector_dtype).double() for key, value in made.items()}

    def outputs(self, x: Tensor, of_second: Tensor | None = None) -> Tensor:
        """Of the whole model; `of_second` is what the second layer reads, if that is not x."""
        with torch.no_grad():
            dense = {name: layer.dense() for name, layer in self.layers.items()}
            return self._outputs(x.double(), dense, None if of_second is None else of_second.double())

    def backward(self, x: Tensor, output_gradient: Tensor) -> dict[str, Gradient]:
        """Gradients of "x" and of everything trained, by name; while merged there are none but that of x.

        Deviations are measured by the largest value of any of four output gradients, with and without the gradient
        through the norm: what cancels is rounded like what does not.
        """
        found = self._gradients(x, output_gradient)
        others = [self._gradients(x, output, detach) for output in _like(output_gradient) for detach in (False, True)]
        return {
            name: Gradient(value, max(float(each[name].abs().max()) for each in others))
            for name, value in found.items()
        }

    def _gradients(self, x: Tensor, output_gradient: Tensor, detach_norm: bool | None = None) -> dict[str, Tensor]:
        dense = {name: layer.dense() for name, layer in self.layers.items()}
        for each in dense.values():
            each.detach_norm = each.detach_norm if detach_norm is None else detach_norm
        x = x.detach().double().requires_grad_()
        self._outputs(x, dense).backward(output_gradient.double())
        names = set() if self.is_merged else self.trained
        found = {name: dense[name.partition(".")[0]].get_parameter(name.partition(".")[2]).grad for name in names}
        return {"x": x.grad, **found}

    def cast(self, dtype: torch.dtype) -> None:
        """The whole model to a dtype."""
        self.dtype = dtype
        for name in self.names():
            self[name] = self[name].to(self.dtype_of(name))
        for name, (value, size) in self.gradients.items():
            rounding = torch.finfo(self.dtype_of(name)).eps * float(value.abs().max())
            self.gradients[name] = Gradient(value, size + rounding)
        if self.is_merged:
            self.merged_in = self.coarsest

    def merge(self, *names: str) -> None:
        """Those of the layers that are not merged."""
        for name in names:
            layer = self.layers[name]
            if layer.merged is None:
                layer.merged, self.merged_in = layer.weight_of(layer.dense()).detach(), self.coarsest

    def unmerge(self, *names: str) -> None:
        """Layers."""
        for name in names:
            self.layers[name].merged = None
        self.merged_in = self.merged_in if self.is_merged else None

    def of_layer(self, name: str) -> Shadow:
        """A model of one layer only."""
        return replace(self, layers={name: self.layers[name]}, trained={n for n in self.trained if n.startswith(name)})

    def _outputs(self, x: Tensor, dense: dict[str, DenseDVoRA], of_second: Tensor | None = None) -> Tensor:
        def layer(name: str) -> Callable[[Tensor], Tensor]:
            return lambda x: linear(x, self.layers[name].weight_of(dense[name]), dense[name].bias)

        if len(self.layers) == 1:
            return layer(next(iter(self.layers)))(x)
        first, second, last = map(layer, NAMES)
        return combined(x, first, second if of_second is None else lambda _: second(of_second), last)


def _like(output_gradient: Tensor) -> list[Tensor]:
    """An output gradient, and others of its size."""
    size, generator = output_gradient.double().square().mean().sqrt(), torch.Generator().manual_seed(0)
    shape = output_gradient.shape
    return [output_gradient, *(size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))]
