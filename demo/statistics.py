"""What training changed in the weights."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention output",
    "intermediate.dense": "feed-forward in",
    "output.dense": "feed-forward out",
}


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
