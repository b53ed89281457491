"""The linear head that is best for frozen features: where every method starts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dvora.recipes.tasks.head_alone import fitted, read_head_alone, save_head_alone
from materials.fetch import build_once

# Strengths tried on the validation rows, beside the summed loss of the training rows.
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def fitted_head(
    name: str,
    parts: Sequence[tuple[Tensor, Callable[[], Tensor]]],
    outputs: int,
    losses: Callable[[Tensor, Tensor], Tensor],
) -> nn.Linear:
    """A head fitted once and kept in the cache: of the penalty with the lowest validation loss.

    Args:
        name: of the task and its sizes.
        parts: labels, and what computes the features, of training and validation.
        outputs: classes (three or more), or 1 for a number.
        losses: of outputs and labels, one a row.
    """

    @torch.no_grad()
    def build(folder: Path) -> None:
        (train_labels, train), (labels, checked) = [(labels, features()) for labels, features in parts]
        classes = 0 if outputs == 1 else outputs
        heads = [fitted(train, train_labels, classes, penalty / len(train)) for penalty in PENALTIES]
        best = min(heads, key=lambda head: losses(head(checked), labels).mean().item())
        save_head_alone(best, folder / "head.safetensors")

    return read_head_alone(build_once(f"quality-head-{name}", build) / "head.safetensors").requires_grad_(True)
