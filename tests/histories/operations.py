"""What can be done to a model: the table of operations that the histories draw from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tests.histories.shadow import Gradient, Shadow
from tests.histories.subjects import VECTORS, Settings, layer_of, parameter

Rng = np.random.Generator

OUTPUTS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}
"""Largest deviation, relative to the largest value, by the coarsest dtype that values went through."""
GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.03}


class MismatchError(AssertionError):
    """The model is not what its shadow says."""


@dataclass
class Case:
    """A model, and what it should be."""

    settings: Settings
    model: nn.Module
    shadow: Shadow
    x: Tensor
    """Inputs in memory that is used again and again."""
    left: list[tuple[nn.Module, Shadow]] = field(default_factory=list)
    """Models that copies were made of, which must stay right."""

    @property
    def trains_nothing(self) -> bool:
        """Whether a recorded pass is refused: vectors want gradients, and what is merged gives them none."""
        merged = [name for name, layer in self.shadow.layers.items() if layer.merged is not None]
        wanted = any(name.partition(".")[0] in merged and is_vector(name) for name in self.shadow.trained)
        return self.shadow.training and wanted

    @property
    def plain(self) -> bool:
        """Whether the layers are adapted one by one."""
        return self.settings.interface == "plain"

    def parameter(self, name: str) -> nn.Parameter:
        """A vector, weight or bias by a name like "first.magnitude"."""
        return parameter(self.model, name)

    def layer(self, name: str) -> nn.Module:
        """An adapted layer."""
        return layer_of(self.model, name)

    def some(self, rng: Rng, names: list[str] | set[str]) -> list[str]:
        """Some of the names, at least one."""
        names = sorted(names)
        return [names[i] for i in sorted(rng.choice(len(names), int(rng.integers(1, len(names) + 1)), replace=False))]

    def inputs(self, rng: Rng) -> Tensor:
        """Few or many tokens, new or in the memory of those before."""
        if rng.random() < 0.5:
            with torch.no_grad():
                self.x = self.x.to(self.shadow.dtype)
                self.x.data.copy_(torch.from_numpy(rng.normal(size=self.x.shape)))
            return self.x
        shape = [(3,), (2, 20), ()][int(rng.integers(3))]
        return torch.from_numpy(rng.normal(size=(*shape, self.settings.width))).to(self.shadow.dtype)

    def add_gradients(self, found: dict[str, Gradient], tolerance: float) -> None:
        """Enter what a backward pass adds to `.grad`, and how far it may be off."""
        for name, (value, size) in found.items():
            before = self.shadow.gradients.get(name, Gradient(torch.zeros_like(value), 0.0))
            self.shadow.gradients[name] = Gradient(before.value + value, before.size + tolerance * size)


def is_vector(name: str) -> bool:
    """Whether a name is one of the adapter's."""
    return name.rpartition(".")[2] in VECTORS


class Operation(NamedTuple):
    """One of the things that can be done."""

    name: str
    run: Callable[[Case, Rng], None]
    weight: float
    when: Callable[[Case], bool]


OPERATIONS: dict[str, Operation] = {}


def operation(
    weight: float = 1.0, when: Callable[[Case], bool] = lambda case: True
) -> Callable[[Callable[[Case, Rng], None]], Callable[[Case, Rng], None]]:
    """Enter a function in the table. It does the thing to the model first and then to the shadow."""

    def enter(function: Callable[[Case, Rng], None]) -> Callable[[Case, Rng], None]:
        OPERATIONS[function.__name__] = Operation(function.__name__, function, weight, when)
        return function

    return enter


def unmerged(case: Case) -> bool:
    """Nothing is merged."""
    return not case.shadow.is_merged


def is_plain(case: Case) -> bool:
    """Adapted one by one."""
    return case.plain


def in_peft(case: Case) -> bool:
    """Adapted through PEFT."""
    return not case.plain


def in_peft_unmerged(case: Case) -> bool:
    """Adapted through PEFT, nothing merged."""
    return not case.plain and not case.shadow.is_merged


def recordable(case: Case) -> bool:
    """Passes may be recorded."""
    return not case.trains_nothing


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, size: float | None = None) -> None:
    """Within a share of the largest value, or of a size that is given.

    Raises:
        MismatchError: it is not.
    """
    if actual.shape != expected.shape:
        raise MismatchError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not actual.numel():
        return
    deviation = float((actual.detach().double() - expected.detach().double()).abs().max())
    size = max(1e-3, float(expected.abs().max()) if size is None else size)
    if not deviation <= tolerance * size:
        raise MismatchError(f"{what}: off by {deviation:.3g} of {size:.3g}, allowed are {tolerance * size:.2g}")


def check_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """To the last bit.

    Raises:
        MismatchError: it is not.
    """
    if not torch.equal(actual.detach().double(), expected):
        raise MismatchError(
            f"{what}: off by {float((actual.detach().double() - expected).abs().max()):.3g}, expected no change"
        )
