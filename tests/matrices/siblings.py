"""Three layers that read one input, with one pair of matrices or each with its own, and how often x is projected."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dvora import DVoRAAdapter
from dvora.matrices.interface import SharedProjections
from tests.cached_layers import IN, OUTS, RANK
from tests.cases import SHARED, randn, trained_layer
from tests.reference import worst_error

Layers = Sequence[DVoRAAdapter]
Step = Callable[[Layers], list[Tensor]]
"""What is done with the layers, and the tensors that come of it."""
TOKENS = 4
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def siblings(
    together: bool = True, ranks: Sequence[int] = (RANK,) * 3, dtype: torch.dtype = torch.float64
) -> list[DVoRAAdapter]:
    """Three trained layers with one pair of matrices, or with equal pairs, which can share nothing."""
    shared = SharedProjections(SHARED.seed)
    return [
        trained_layer(IN, out, rank, dtype=dtype, shared=shared if together else SharedProjections(SHARED.seed))
        for out, rank in zip(OUTS, ranks, strict=True)
    ]


def inputs(tokens: int = TOKENS, *, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """A leaf."""
    return randn(tokens, IN, seed=seed, dtype=torch.float64).requires_grad_(requires_grad)


def outputs(layers: Layers, x: Tensor) -> Tensor:
    """Those of all layers, one after another."""
    return torch.cat([layer(x) for layer in layers], dim=-1)


def loss(y: Tensor) -> Tensor:
    """A scalar that every output matters to in another way."""
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().sum()


class Calls:
    """The products with A^T and with A that the layers make from now on, and weak references to their results."""

    def __init__(self, layers: Layers) -> None:
        self.forward = self.backward = 0
        self.made: list[weakref.ref[Tensor]] = []
        for impl in {layer.shared.impl for layer in layers}:
            impl.project = partial(self._project, impl.project)
            impl.project_transpose = partial(self._project_transpose, impl.project_transpose)

    def _project(self, project: Callable[[Tensor, int], Tensor], x: Tensor, rank: int) -> Tensor:
        z = project(x, rank)
        self.forward += 1
        self.made.append(weakref.ref(z))
        return z

    def _project_transpose(self, project: Callable[[Tensor, int], Tensor], h: Tensor, size: int) -> Tensor:
        self.backward += 1
        return project(h, size)


def projections_made(step: Step, tolerance: float | None = None, **options: object) -> int:
    """Products with A^T in a step whose results, and whose gradients, are those of layers that share nothing."""
    together, apart = siblings(**options), siblings(together=False, **options)
    calls = Calls(together)
    results = []
    for layers in (together, apart):
        found = step(layers)
        results.append([*found, *(v.grad for layer in layers for v in layer.vectors if v.grad is not None)])
    for value, reference in zip(*results, strict=True):
        assert value.dtype == reference.dtype
        assert worst_error(value, reference.double()) < (tolerance or TOLERANCE[value.dtype])
    return calls.forward
