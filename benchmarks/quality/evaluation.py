"""What a task of the grid is: a model to start from, batches, a loss, and an evaluation of a split."""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from benchmarks.quality.backbones import ImageReader, SentenceReader, TextModel

Batch = dict[str, Tensor]
Reader = SentenceReader | ImageReader | TextModel


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on one split.

    Args:
        loss: mean of the training loss.
        score: accuracy, Pearson's correlation, or bits per byte (where less is better).
        items: one value a row, from which the score can be computed again: correct (1) or not (0), the predicted
            number, or the nats of a window.
    """

    loss: float
    score: float
    items: np.ndarray = field(repr=False)


class Problem(Protocol):
    """One task."""

    @property
    def reference(self) -> np.ndarray | None:
        """(test items,) what items are compared with: true numbers, or bytes; None: each item is correct or not."""
        ...

    def model(self, base: str) -> Reader:
        """The pretrained model, with the head that is best for its frozen features."""
        ...

    def batches(self, seed: int, steps: int) -> list[np.ndarray]:
        """Rows of every step, the same for every method."""
        ...

    def loss(self, model: nn.Module, rows: np.ndarray) -> Tensor:
        """Mean loss of training rows."""
        ...

    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """The metrics of the model on "validation" or "test"."""
        ...
