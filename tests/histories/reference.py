"""What the model of a history must be: its adapters and weights as plain tensors, and the dense float64 method on them.

Nothing is computed by the model under test; of its vectors every bit was compared. What rounding leaves open (a merged
weight, a trained vector) is checked against float64 and then taken over to the last bit, so that everything else can be
compared bit for bit.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from dvora import DVoRAConfig
from tests.histories.model import COEFFICIENTS, PARAMETERS, TOKENS, WEIGHTS, mixed
from tests.peft.dense_weights import DenseModel

VECTORS = ("magnitude", "lambda_b", "lambda_d")


class Place(NamedTuple):
    """Where a trained vector is."""

    weight: str
    adapter: str
    vector: str


@dataclass(frozen=True)
class Settings:
    """The settings of an adapter that histories vary."""

    targets: tuple[str, ...]
    r: int = 3
    alpha: float | None = None
    direction: str = "unit"
    detach_norm: bool = False
    seed: int = 0
    projections: str = "structured"
    random_start: bool = False
    train: tuple[str, ...] = VECTORS
    """The vectors that are trained."""
    strength: float = 1.0

    def config(self) -> DVoRAConfig:
        return DVoRAConfig(
            r=self.r,
            alpha=self.alpha,
            target_modules=[target for target in self.targets if target not in PARAMETERS],
            target_parameters=[target for target in self.targets if target in PARAMETERS],
            train=self.train,
            strength=self.strength,
            direction=self.direction,
            detach_norm=self.detach_norm,
            projection_seed=self.seed,
            projection_init=self.projections,
            init_weights=not self.random_start,
        )

    def weights(self) -> list[str]:
        """The names of the weights that the adapter adapts."""
        return [name for name, weight in WEIGHTS.items() if weight.target in self.targets]


@dataclass
class Adapter:
    """One adapter: its vectors by weight and name, and whether they are trained."""

    settings: Settings
    vectors: dict[str, dict[str, Tensor]]
    trained: bool = False
    strength: dict[str, float] = field(default_factory=dict)
    """By weight: s of `W + s (W' - W)`."""

    def trains(self, vector: str) -> bool:
        return self.trained and vector in self.settings.train


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """What vectors are kept in beside a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Reference:
    """The state of the model."""

    dtype: torch.dtype
    stored: dict[str, Tensor]
    """Every parameter of the base as the model has to hold it, to the last bit; merged weights too."""
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    merged: dict[str, list[str]] = field(default_factory=dict)
    """Merged adapters by weight."""
    original: dict[str, Tensor] = field(default_factory=dict)
    """Of merged weights: as they were before."""
    slack: float = 1.0
    """How much worse than usual the adapters are conditioned; `conditioning` of the last look."""
    enabled: bool = True
    training: bool = False

    @classmethod
    def of_base(cls, dtype: torch.dtype) -> "Reference":
        return cls(dtype, {name: value.detach().clone() for name, value in mixed(dtype).named_parameters()})

    def base(self, weight: str) -> Tensor:
        """The base's own weight."""
        return self.original.get(weight, self.stored[weight])

    def at(self, weight: str) -> list[str]:
        """The adapters of a weight."""
        return [name for name, adapter in self.adapters.items() if weight in adapter.vectors]

    def in_effect(self, weight: str) -> list[str]:
        """The adapters that a forward pass applies to the weight, beyond what is merged into it."""
        if weight in self.merged or not self.enabled:
            return []
        return [name for name in self.active if name in self.at(weight)]

    def trains_merged(self) -> bool:
        """Whether vectors are trained whose adapter is merged, so that they would get no gradients."""
        merged = [(self.adapters[name], weight) for weight, names in self.merged.items() for name in names]
        return self.enabled and any(a.trains(vector) for a, weight in merged for vector in a.vectors[weight])

    # ---- what operations do

    def add(self, name: str, settings: Settings, model: PeftModel) -> None:
        """Enter an adapter that the model has got, as it has to start: it changes nothing yet."""
        self.unmerge()
        dtype = vector_dtype(self.dtype)
        self.adapters[name] = Adapter(settings, {}, strength=dict.fromkeys(settings.weights(), settings.strength))
        dense = self.dense(model, [name]).weights
        for weight in settings.weights():
            magnitude = dense[weight].adapters[0].weight.detach().norm(dim=1).to(dtype)
            self.adapters[name].vectors[weight] = {
                "magnitude": magnitude,
                "lambda_b": torch.zeros(len(magnitude), dtype=dtype),
                "lambda_d": torch.full((settings.r,), 0.1, dtype=dtype),
            }

    def activate(self, names: list[str], trained: bool = True) -> None:
        """Make these the active adapters, and those whose vectors are trained."""
        self.unmerge()
        self.active = list(names)
        self.train(names if trained else [])

    def train(self, names: list[str]) -> None:
        """Train the vectors of these adapters and of no others."""
        for name, adapter in self.adapters.items():
            adapter.trained = name in names

    def delete(self, name: str) -> None:
        """Remove an adapter; where it was the only active one, the first of the others takes its place."""
        del self.adapters[name]
        if name in self.active:
            self.active = [other for other in self.active if other != name] or sorted(self.adapters)[:1]
            self.train(self.active)

    def enable(self, enabled: bool) -> None:
        """Switch all adapters on or off; PEFT has disabled adapters trained never and enabled ones always."""
        self.enabled = enabled
        self.train(self.active if enabled else [])

    def merge(self, names: list[str] | None) -> list[str]:
        """Enter adapters as merged; returns the weights that change. `merged_weights` is what they become."""
        changed = []
        for weight in WEIGHTS:
            merged = self.merged.get(weight, [])
            new = [n for n in (self.active if names is None else names) if n in self.at(weight) and n not in merged]
            if new:
                self.original.setdefault(weight, self.stored[weight].clone())
                self.merged[weight] = [*merged, *new]
                changed.append(weight)
        return changed

    def unmerge(self) -> None:
        """Put the base's own weights back."""
        for weight, original in self.original.items():
            self.stored[weight] = original
        self.original.clear()
        self.merged.clear()

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the base, and the vectors to what is kept beside it."""
        self.dtype = dtype
        for values in (self.stored, self.original):
            values.update({name: value.to(dtype) for name, value in values.items()})
        for adapter in self.adapters.values():
            for vectors in adapter.vectors.values():
                vectors.update({name: value.to(vector_dtype(dtype)) for name, value in vectors.items()})

    # ---- what it computes, densely in float64, from vectors that were compared bit for bit

    def dense(self, model: PeftModel, names: list[str] | None = None) -> DenseModel:
        """With the adapters in effect on the weights as they are; or with exactly these on the base's own weights."""
        base = mixed(torch.float64)
        for name, parameter in base.named_parameters():
            parameter.data = (self.stored[name] if names is None else self.base(name)).double().clone()
        dense = DenseModel(base, model, self.active if names is None else names)
        if names is None:
            dense.weights = {weight: one for weight, one in dense.weights.items() if self.in_effect(weight)}
        return dense

    @torch.no_grad()
    def conditioning(self, model: PeftModel) -> float:
        """By how much float32 may be worse than usual: where updates nearly cancel rows, or dwarf them.

        The first no implementation can help, the second comes of keeping a gain as its distance to one.
        """
        worst = 1.0
        for name in self.adapters:
            for dense in (one.adapters[0] for one in self.dense(model, [name]).weights.values()):
                ratio = dense.norm_ratio()[dense.weight.norm(dim=1) > 0]
                worst = max(worst, 0.03 * float(torch.maximum(ratio, 1 / ratio).max()))
        return worst

    @torch.no_grad()
    def deltas(self, model: PeftModel, name: str) -> dict[str, Tensor]:
        """s (W' - W) of one adapter, as stored, by weight."""
        parameters = self.dense(model, [name]).parameters()
        return {weight: value - self.base(weight).double() for weight, value in parameters.items()}

    def merged_weights(self, model: PeftModel, changed: list[str]) -> dict[str, Tensor]:
        """These weights with their merged adapters, in exact arithmetic."""
        deltas = {name: self.deltas(model, name) for name in self.adapters}
        return {w: self.base(w).double() + sum(deltas[name][w] for name in self.merged[w]) for w in changed}

    @torch.no_grad()
    def outputs(self, model: PeftModel, names: list[str] | None = None) -> Tensor:
        """What the model returns; or what it returns with exactly these adapters instead, unmerged."""
        return self.dense(model, names)(TOKENS)

    def gradients(self, model: PeftModel) -> dict[Place, Tensor]:
        """The gradients of the loss: of the vectors in effect that are trained."""
        dense = self.dense(model)
        loss(dense(TOKENS)).backward()
        return {
            Place(weight, name, vector): getattr(adapter, vector).grad
            for weight, one in dense.weights.items()
            for name, adapter in zip(self.in_effect(weight), one.adapters, strict=True)
            for vector in self.adapters[name].vectors[weight]
            if self.adapters[name].trains(vector)
        }


def loss(outputs: Tensor) -> Tensor:
    """A scalar that every output matters to."""
    return (outputs * COEFFICIENTS.to(outputs.dtype)).sum()
