"""Which layers of a PEFT model follow a plan in a pass, and which find everything by themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dvora.tuner import DVoRALayer
from dvora.weight.plan import EvaluationPlan
from tests.tuner.tiny import dvora_layers
from tests.tuner.towers import evaluated


class Ways:
    """How the layers of a pass went."""

    def __init__(self) -> None:
        self.followed = 0
        """Outputs that came from a plan."""
        self.slowly: list[str] = []
        """Layers that asked for their factors."""
        self.made = 0
        """Plans, kept or not."""


@contextmanager
def watched() -> Iterator[Ways]:
    """Counts while it is on; nothing else changes."""
    ways = Ways()
    follow, find, make = EvaluationPlan.outputs, DVoRALayer._active, EvaluationPlan.__init__

    def following(plan: EvaluationPlan, *args: object) -> Tensor:
        ways.followed += 1
        return follow(plan, *args)

    def finding(layer: DVoRALayer, *args: object) -> object:
        ways.slowly.append(layer.name)
        return find(layer, *args)

    def making(plan: EvaluationPlan, *args: object) -> None:
        ways.made += 1
        make(plan, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationPlan, "__init__", making)
        patch.setattr(EvaluationPlan, "outputs", following)
        patch.setattr(DVoRALayer, "_active", finding)
        yield ways


def with_plans(model: PeftModel, x: Tensor | None = None) -> PeftModel:
    """The model in evaluation, after passes that gave every layer a plan."""
    model.eval()
    for _ in range(2):
        evaluated(model, x)
    with watched() as ways:
        evaluated(model, x)
    assert ways.followed == len(list(dvora_layers(model)))
    assert not ways.slowly
    return model


def followed(model: PeftModel, x: Tensor | None = None) -> int:
    """How many layers follow their plan in a pass."""
    with watched() as ways:
        evaluated(model, x)
    return ways.followed


def close(found: Tensor, expected: Tensor) -> bool:
    """Equal to rounding in float32."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
