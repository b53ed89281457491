"""The adapters of the surgery histories: their settings, and what a model has to hold of each."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dvora import DVoRAConfig
from tests.tuner.surgery.surgery_model import PARAMETERS, WEIGHTS

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
    magnitude_only: tuple[str, ...] = ()
    """Targets whose layers get the magnitude only."""
    strength: float = 1.0

    def config(self) -> DVoRAConfig:
        return DVoRAConfig(
            r=self.r,
            alpha=self.alpha,
            target_modules=[target for target in self.targets if target not in PARAMETERS],
            target_parameters=[target for target in self.targets if target in PARAMETERS],
            magnitude_modules=list(self.magnitude_only),
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
        adapted = {*self.targets, *self.magnitude_only}
        return [name for name, weight in WEIGHTS.items() if weight.target in adapted]


@dataclass
class Adapter:
    """One adapter: its vectors by weight and name, and whether they are trained."""

    settings: Settings
    vectors: dict[str, dict[str, Tensor]]
    trained: bool = False
    strength: dict[str, float] = field(default_factory=dict)
    """By weight: s of `W + s (W' - W)`."""

    def shapes(self) -> dict[tuple[str, str], torch.Size]:
        """Of the vectors by weight and name."""
        return {(w, vector): value.shape for w, vectors in self.vectors.items() for vector, value in vectors.items()}

    def trains(self, vector: str) -> bool:
        return self.trained and vector in self.settings.train


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """What vectors are kept in beside a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
