"""Layers with trained vectors, and the sizes that the tests go through."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvora import DVoRAAdapter, SharedProjections

SHARED = SharedProjections(seed=3)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Worst relative error against the dense float64 reference, by dtype of the base."""

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["unit", "weight"]

SIZES = [
    pytest.param(1, 1, 1, id="1x1"),
    pytest.param(9, 1, 2, id="one output"),
    pytest.param(5, 7, 3, id="small"),
    pytest.param(6, 9, 20, id="rank above both sizes"),
    pytest.param(300, 500, 16, id="300 inputs, 500 outputs"),
]
"""in_features, out_features, rank."""


def through_torch_save(module: nn.Module) -> nn.Module:
    """What a file of the whole module gives back."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_torch_save,
}
"""All ways to copy a whole module."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same for one seed whatever ran before, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(in_features: int, out_features: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer with rows of different norms."""
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(randn(out_features, in_features, seed=1) * (0.5 + randn(out_features, 1, seed=2).abs()))
        if bias:
            base.bias.copy_(randn(out_features, seed=3))
    return base


def train(layer: DVoRAAdapter) -> DVoRAAdapter:
    """Give a layer vectors that turn its rows by tens of degrees and change their norms by tens of percent."""
    with torch.no_grad():
        layer.magnitude.mul_(1 + 0.2 * randn(*layer.magnitude.shape, seed=4))
        layer.lambda_b.copy_(1.5 * randn(*layer.lambda_b.shape, seed=5))
        layer.lambda_d.add_(0.1 * randn(*layer.lambda_d.shape, seed=6))
    return layer


def trained_layer(
    in_features: int,
    out_features: int,
    rank: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    shared: SharedProjections = SHARED,
    **options: object,
) -> DVoRAAdapter:
    """An adapter on `linear` with the vectors of `train`."""
    base = linear(in_features, out_features, bias=bias, dtype=dtype)
    return train(DVoRAAdapter(base, rank, shared=shared, **options))


def fresh_copy(layer: DVoRAAdapter) -> DVoRAAdapter:
    """A new adapter on a copy of the base as it is now, with the same vectors: nothing in it can be stale."""
    adapted = layer.adapted
    base = nn.Linear(adapted.in_features, adapted.out_features, layer.base_layer.bias is not None)
    base = base.to(layer.base_layer.weight.dtype)
    base.load_state_dict(copy.deepcopy(layer.base_layer.state_dict()))
    options = {"alpha": layer.alpha, "direction": adapted.direction, "detach_norm": adapted.detach_norm}
    options |= {"lambda_d_groups": adapted.groups}
    fresh = DVoRAAdapter(base, layer.rank, freeze_base_layer=layer.freeze_base_layer, shared=layer.shared, **options)
    with torch.no_grad():
        for own, other in zip(fresh.vectors, layer.vectors, strict=True):
            own.copy_(other)
    return fresh


def nearly_cancelled(layer: DVoRAAdapter, ratio: float) -> DVoRAAdapter:
    """Give every row of the base a direction almost opposite to its update, so that n / w is about `ratio`."""
    base, rank = layer.base_layer, layer.rank
    A = layer.shared.A(rank, base.in_features, torch.float64)
    B = layer.shared.B(rank, base.out_features, torch.float64)
    with torch.no_grad():
        layer.lambda_d.add_(0.1 * randn(rank, seed=6))
        update = layer.alpha / rank * (B * layer.lambda_d.double()) @ A
        size = update.norm(dim=1, keepdim=True)
        rest = nn.functional.normalize(randn(*base.weight.shape, seed=7, dtype=torch.float64), dim=1)
        base.weight.copy_(-update / size + ratio * rest)
        w = base.weight.double().norm(dim=1)
        layer.magnitude.copy_(w * (1 + 0.2 * randn(len(w), seed=4)))
        layer.lambda_b.copy_((1.0 if layer.adapted.direction == "unit" else w) / size[:, 0])
    return layer
