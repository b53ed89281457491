"""The demo's statistics against known values."""

import math

import pytest
import torch
from torch import nn

from demo.statistics import layer_changes, linear_weights, sign_test, wilson


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [
        # R's prop.test(correct, count, correct = FALSE).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_agrees_with_published_intervals(correct: int, count: int, low: float, high: float) -> None:
    assert wilson(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_sign_test() -> None:
    assert sign_test(0, 0) == sign_test(5, 5) == 1.0
    assert sign_test(10, 0) == 2 / 2**10
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def encoder_with(weight: torch.Tensor) -> nn.Module:
    """A module whose one linear layer has the name that a transformer's query has."""
    query = nn.Linear(2, 2)
    query.weight = nn.Parameter(weight)
    attention = nn.ModuleDict({"self": nn.ModuleDict({"query": query})})
    return nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"attention": attention})])})


def test_layer_changes_measures_length_and_turn() -> None:
    before = linear_weights(nn.ModuleDict({"encoder": encoder_with(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))}))
    turned = torch.tensor([[math.cos(0.1), math.sin(0.1)], [0.0, 3.0]])
    after = linear_weights(nn.ModuleDict({"encoder": encoder_with(turned)}))
    (change,) = layer_changes(before, after)
    assert (change.layer, change.kind) == (0, "query")
    assert change.magnitude == pytest.approx(0.25, abs=1e-6)
    assert change.angle == pytest.approx(math.degrees(0.1) / 2, abs=1e-5)
