"""Confidence interval of an accuracy, sign test of two models, and what training changed in the weights."""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# The quantile of the normal distribution that leaves 2.5 % above it.
NORMAL_97_5 = 1.959964
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "feed-forward in",
    "output.dense": "feed-forward out",
}


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the share behind `correct` of `count`.

    Raises:
        ValueError: correct is not in 0 ... count, or count is not positive.
    """
    if not 0 <= correct <= count or count == 0:
        raise ValueError(
            f"correct={correct} of count={count} is no share: 0 <= correct <= count and 0 < count are needed"
        )
    share, square = correct / count, NORMAL_97_5**2
    centre = share + square / (2 * count)
    reach = NORMAL_97_5 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (centre - reach) / (1 + square / count), (centre + reach) / (1 + square / count)


def sign_test(wins: int, losses: int) -> float:
    """How likely a fair coin is to split `wins + losses` tosses at least this unevenly (two-sided, exact).

    For two models on the same sentences: wins are those that only the first classifies correctly, losses those that
    only the second does.
    """
    count = wins + losses
    tail = sum(math.comb(count, number) for number in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / (1 << count))


@dataclass(frozen=True)
class LayerChange:
    """What training did to one linear layer.

    Args:
        layer: number of the transformer layer, from 0.
        kind: which linear layer of it.
        magnitude: mean relative change of the length of a row of the weight, without its sign.
        angle: mean angle between a row's old and new direction, in degrees.
    """

    layer: int
    kind: str
    magnitude: float
    angle: float


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies in float64 of the weights of all linear layers of the transformer, by their names."""
    return {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer." in name
    }


def layer_changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[LayerChange]:
    """What changed between two sets of `linear_weights`."""
    return [_layer_change(name, weight, after[name]) for name, weight in before.items()]


def _layer_change(name: str, before: Tensor, after: Tensor) -> LayerChange:
    place = re.search(r"\.layer\.(\d+)\.(.+)$", name)
    assert place is not None, "linear_weights gives layers of the transformer only"
    old, new = before.norm(dim=1), after.norm(dim=1)
    # The chord between unit rows: an arc cosine would lose small angles.
    chord = (before / old[:, None] - after / new[:, None]).norm(dim=1)
    angle = torch.rad2deg(2 * torch.asin((chord / 2).clamp(max=1)))
    magnitude = (new / old - 1).abs()
    return LayerChange(int(place[1]), KINDS[place[2]], magnitude.mean().item(), angle.mean().item())
