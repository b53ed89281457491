"""Adapters in training, all in one bank and each alone in a PEFT model with torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

import dvora
from dvora.bank import TrainableAdapters
from dvora.flat import Layout
from dvora.training import parameter_groups
from tests.peft.kinds import Kind, saved
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import inputs

RATES = {"magnitude": 0.003, "lambda_b": 0.01, "lambda_d": 0.02, "head": 0.005}
EPS = 1e-4
"""Or the first steps would be as long for a gradient that is a rounding error as for any other."""
NAMES = ("a", "b", "c")
BATCHES = (["a", "b", "a", "c", "b"], ["c", "b", "c"], ["a"] * 4, ["b", "c", "a"], ["c", "a", "b", "b"], ["b", "a"])
"""Which adapter each row has, step by step."""


class Batch(NamedTuple):
    names: Sequence[str]
    inputs: Mapping[str, Tensor]

    def of(self, name: str) -> dict[str, Tensor]:
        rows = [row for row, each in enumerate(self.names) if each == name]
        return {key: value[rows] for key, value in self.inputs.items()}


def batch_of(model: nn.Module, names: Sequence[str], number: int = 0) -> Batch:
    """Other inputs for every number."""
    rows = inputs(model, len(names) + number)
    return Batch(names, {key: value[number:] for key, value in rows.items()})


def row_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """One a row, of the order of one."""
    output = model(**batch)
    output = output if isinstance(output, Tensor) else output.logits
    return (output.float().flatten(1) - 0.5).square().mean(1)


class Together(NamedTuple):
    """A bank's adapters and their optimizer."""

    model: nn.Module
    bank: dvora.AdapterBank
    adapters: TrainableAdapters
    optimizer: torch.optim.AdamW
    max_grad_norm: float | None = None

    def backward(self, batch: Batch, share: float = 1.0) -> None:
        """Add the gradients of a batch."""
        with self.adapters.rows(batch.names) as rows:
            (share * rows.loss(row_losses(self.model, batch.inputs))).backward()

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.backward(batch)
        self.update()

    def update(self) -> None:
        """Step all that have a gradient."""
        if self.max_grad_norm is not None:
            self.adapters.clip_grad_norm_(self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alone:
    """Every adapter by itself.

    Args:
        folder: of saved adapters.
        base: makes their base.
        weight_decay: as for `parameter_groups`.
        max_grad_norm: for `clip_grad_norm_`, if any.
    """

    def __init__(
        self,
        folder: Path,
        base: Callable[[], nn.Module],
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
    ) -> None:
        self.layout, self.max_grad_norm = Layout.of(folder / NAMES[0]), max_grad_norm
        self.models: dict[str, PeftModel] = {}
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        for name in NAMES:
            model = PeftModel.from_pretrained(base(), folder / name, is_trainable=True).eval()
            groups = parameter_groups(model, 0.01, weight_decay=weight_decay)
            for group in groups:
                group["lr"] = RATES[group["name"]]
            self.models[name], self.optimizers[name] = model, torch.optim.AdamW(groups, eps=EPS)

    def vector(self, name: str) -> Tensor:
        """The values of an adapter."""
        return self.layout.to_vector(self.models[name])

    def backward(self, batch: Batch, share: float = 1.0) -> None:
        """Add the gradients of a batch's adapters."""
        for name in set(batch.names):
            (share * row_losses(self.models[name], batch.of(name)).mean()).backward()

    def update(self, names: Sequence[str]) -> None:
        """Step some adapters with the gradients that they have."""
        for name in set(names):
            parameters = [p for group in self.optimizers[name].param_groups for p in group["params"]]
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def step(self, batch: Batch) -> None:
        """One step of every adapter of a batch on its rows."""
        self.backward(batch)
        self.update(batch.names)


def save_all(kind: Kind, folder: Path, **settings: Any) -> None:
    """Save adapters of all names, with values of their own."""
    for seed, name in enumerate(NAMES):
        saved(kind.trained(seed, **settings), folder / name)


@contextmanager
def together(
    kind: Kind, folder: Path, *, weight_decay: float = 0.0, max_grad_norm: float | None = None
) -> Iterator[Together]:
    """Saved adapters in a bank, in training."""
    model = kind.base().eval().requires_grad_(False)
    with dvora.AdapterBank(model, like=folder / NAMES[0]) as bank:
        bank.add_folder(folder)
        adapters = bank.trainable(NAMES)
        groups = adapters.parameter_groups(weight_decay=weight_decay)
        for group in groups:
            group["lr"] = RATES[group["name"]]
        optimizer = torch.optim.AdamW(groups, eps=EPS, foreach=True)
        yield Together(model, bank, adapters, optimizer, max_grad_norm)


@torch.no_grad()
def gradient_vector(model: PeftModel, layout: Layout) -> Tensor:
    """The gradients of an adapter in the order of a flat vector; its values are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return layout.to_vector(model)


@torch.no_grad()
def gradient_of(adapters: TrainableAdapters, name: str) -> Tensor:
    """The gradient of an adapter in the order of a flat vector; its values are lost."""
    for parameter in adapters.parameters_of[name].values():
        parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return adapters.flat_vector(name)


def check_gradients(both: Together, alone: Alone, tolerance: float = 1e-6) -> None:
    """Of every adapter, together and alone."""
    for name in NAMES:
        expected = gradient_vector(alone.models[name], alone.layout)
        own = gradient_of(both.adapters, name)
        assert expected.any()
        assert worst_difference(own, expected) < tolerance


def largest_difference(both: Together, alone: Alone) -> float:
    """Of the values of any adapter, relative to its largest."""
    return max(worst_difference(both.adapters.flat_vector(name), alone.vector(name)) for name in NAMES)
