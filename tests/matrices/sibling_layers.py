"""Three layers that read the same inputs, together or each for itself, and how many products they make."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dvora import DVoRAAdapter, SharedProjections
from dvora.matrices.dense import DenseMatrices
from tests.cases import SHARED, randn, trained_layer
from tests.reference import worst_error

TOKENS, IN, RANK, OUTS = 4, 6, 3, (5, 8, 9)
"""All different, so that shapes tell products apart."""

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Step = Callable[[Sequence[DVoRAAdapter]], list[Tensor]]
"""What is done with the layers, and the tensors that come of it."""


class CountedMatrices(DenseMatrices):
    """Dense matrices that count their products with A^T."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, "kaiming_uniform")
        self.projected = 0

    def project(self, x: Tensor, rank: int) -> Tensor:
        """`x A^T`."""
        self.projected += 1
        return super().project(x, rank)


class Products(TorchDispatchMode):
    """Counts matrix products by their sizes (rows, summed, columns)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.sizes[(*args[-2].shape, args[-1].shape[1])] += 1
        return func(*args, **(kwargs or {}))

    def forward(self, tokens: int = TOKENS) -> int:
        """Products with A^T."""
        return self.sizes[tokens, IN, RANK]

    def backward(self, tokens: int = TOKENS) -> int:
        """Products with A."""
        return self.sizes[tokens, RANK, IN]


def siblings(
    *,
    together: bool = True,
    counted: bool = False,
    ranks: Sequence[int] = (RANK,) * 3,
    dtype: torch.dtype = torch.float64,
) -> list[DVoRAAdapter]:
    """Three trained layers of three sizes, with one pair of matrices or with equal pairs, which can share nothing.

    Args:
        together: one pair.
        counted: the pair counts the products with A^T.
        ranks: of the layers.
        dtype: of their bases.
    """
    shared = SharedProjections(SHARED.seed)
    if counted:
        shared.impl = CountedMatrices(SHARED.seed)
    return [
        trained_layer(IN, out, rank, dtype=dtype, shared=shared if together else SharedProjections(SHARED.seed))
        for out, rank in zip(OUTS, ranks, strict=True)
    ]


def inputs(tokens: int = TOKENS, *, seed: int = 0, requires_grad: bool = False) -> Tensor:
    """A leaf."""
    return randn(tokens, IN, seed=seed, dtype=torch.float64).requires_grad_(requires_grad)


def outputs(layers: Sequence[DVoRAAdapter], x: Tensor) -> Tensor:
    """Those of all layers, one after another."""
    return torch.cat([layer(x) for layer in layers], dim=-1)


def loss(y: Tensor) -> Tensor:
    """A scalar that every output matters to in another way."""
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().sum()


def gradients(layers: Sequence[DVoRAAdapter]) -> list[Tensor]:
    """Those of all vectors that have one."""
    return [vector.grad for layer in layers for vector in layer.vectors if vector.grad is not None]


def projections_made(step: Step, tolerance: float | None = None, **options: Any) -> int:
    """Products with A^T in a step whose results, and whose gradients, are those of layers that share nothing."""
    together, apart = siblings(counted=True, **options), siblings(together=False, **options)
    matrices = together[0].shared.impl
    assert isinstance(matrices, CountedMatrices)
    before = matrices.projected
    found = [*step(together), *gradients(together)]
    made = matrices.projected - before
    expected = [*step(apart), *gradients(apart)]
    assert len(found) == len(expected)
    for value, reference in zip(found, expected, strict=True):
        assert value.dtype == reference.dtype
        assert worst_error(value, reference.double()) < (tolerance or _TOLERANCE[value.dtype])
    return made
