"""LoRA for serving, as fast as PyTorch makes it: stacked factors, gathered by row, two batched products a layer.

Dimensions: N adapters, B rows of a batch, T tokens a row, I in, O out, r rank, K layers that read one input.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.speed.workloads import random

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))
"""Layers of one module that read the same input."""


class Factors(NamedTuple):
    """Those of one layer for all adapters; B has alpha / r in it."""

    A: Tensor
    """(N, r, I)."""
    B: Tensor
    """(N, r, O)."""


class GatheredLoRA:
    """Many LoRA adapters on a frozen model, by forward hooks; outside of `rows` the model is the base.

    Args:
        model: the frozen base; its layers get hooks.
        factors: by the names of layers, whose inputs are (B, T, I).
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, Factors]) -> None:
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in factors:
            groups.setdefault(_siblings_of(name), []).append(name)
        self._groups: list[_Siblings] = []
        for names in groups.values():
            group = _Siblings([factors[name] for name in names])
            self._groups.append(group)
            for place, name in enumerate(names):
                model.get_submodule(name).register_forward_hook(partial(group.add_to, place))

    @contextmanager
    def rows(self, adapters: Sequence[int]) -> Iterator[None]:
        """Use these adapters, one a row of the batch."""
        for group in self._groups:
            group.start(adapters)
        try:
            yield
        finally:
            for group in self._groups:
                group.stop()


class _Siblings:
    """Layers that read one input, so that their A are one matrix; rows are gathered at the first use in a batch."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.rank = factors[0].A.shape[1]
        self.tables = [torch.cat([each.A for each in factors], 1), *(each.B for each in factors)]
        self.stop()

    def start(self, adapters: Sequence[int]) -> None:
        # One adapter for all rows needs no gathering, and its products are those of plain matrices.
        self.one = adapters[0] if len(set(adapters)) == 1 else None
        self.index: Tensor | None = torch.tensor(adapters)

    def stop(self) -> None:
        self.index = None
        self.gathered: list[Tensor] = []
        self.x: Tensor | None = None

    def add_to(self, place: int, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """The forward hook of the layer at a place: adds to the base's output, which nobody else holds yet."""
        if self.index is None:
            return None
        if not self.gathered:
            self.gathered = [self._gather(table) for table in self.tables]
        if self.x is not inputs[0]:
            self.x = inputs[0]
            self.z = self._projected(self.x).split(self.rank, -2)
        z, B = self.z[place].transpose(-1, -2), self.gathered[1 + place]
        if self.one is not None:
            output.view(-1, output.shape[-1]).addmm_(z, B)
            return output
        return output.addcmul_(z, B) if self.rank == 1 else output.baddbmm_(z, B)

    def _projected(self, x: Tensor) -> Tensor:
        """(K r, B T) for one adapter, (B, K r, T) else: with A first the products are up to five times as fast."""
        A = self.gathered[0]
        return A @ x.flatten(0, -2).T if self.one is not None else torch.bmm(A, x.transpose(1, 2))

    def _gather(self, table: Tensor) -> Tensor:
        """(r, .) for one adapter, (B, r, .) else."""
        if self.one is not None:
            return table[self.one]
        # As rows of a plain matrix, which are copied in one piece each.
        return table.flatten(1).index_select(0, self.index).unflatten(1, table.shape[1:])


def random_factors(
    model: nn.Module, targets: tuple[str, ...], rank: int, count: int, dtype: torch.dtype
) -> dict[str, Factors]:
    """The factors of that many adapters for a model, by the names of its layers.

    Args:
        model: the frozen base.
        targets: what the names of adapted layers end in.
        rank, count, dtype: of the factors.
    """
    found: dict[str, Factors] = {}
    for number, (name, layer) in enumerate(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(targets):
            A = random(count, rank, layer.in_features, dtype=dtype, seed=number)
            B = random(count, rank, layer.out_features, dtype=dtype, seed=number)
            # As large as after some training.
            found[name] = Factors(A / layer.in_features**0.5, 0.01 * B)
    return found


def _siblings_of(name: str) -> tuple[str, ...]:
    parent, _, own = name.rpartition(".")
    return next(((parent, *siblings) for siblings in SIBLINGS if own in siblings), (name,))
