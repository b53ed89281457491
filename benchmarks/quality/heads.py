"""The linear head that is best for frozen features: where every method starts."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dvora.recipes.tasks.head_alone import fitted, read_head_alone, save_head_alone
from materials.fetch import build_once

# Strengths tried on the validation rows, beside the summed loss of the training rows.
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


@torch.no_grad()
def best_head(features: Tensor, labels: Tensor, outputs: int, loss: Callable[[nn.Linear], Tensor]) -> nn.Linear:
    """The head of the penalty with the lowest loss.

    Args:
        features, labels: of the rows that it is fitted to.
        outputs: classes (three or more), or 1 for a number.
        loss: of a head on other rows.
    """
    classes = 0 if outputs == 1 else outputs
    heads = (fitted(features, labels, classes, penalty / len(features)) for penalty in PENALTIES)
    return min(heads, key=lambda head: loss(head).item())


def kept_head(name: str, fit: Callable[[], nn.Linear]) -> nn.Linear:
    """A head that is fitted once and kept in the cache.

    Args:
        name: of the task and its sizes.
        fit: gives it.
    """

    def build(folder: Path) -> None:
        save_head_alone(fit(), folder / "head.safetensors")

    return read_head_alone(build_once(f"quality-head-{name}", build) / "head.safetensors").requires_grad_(True)
