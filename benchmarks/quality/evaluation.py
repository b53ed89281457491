"""What a task of the grid is: a model to start from, batches, a loss, and an evaluation of a split."""

import base64
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor, nn

from benchmarks.quality.models import SentenceReader, TextModel


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model on one split.

    Args:
        loss: mean of the training loss.
        score: accuracy, or Pearson's correlation.
        items: one value a row, from which the score can be computed again: correct or not, or the predicted number.
    """

    loss: float
    score: float
    items: np.ndarray = field(repr=False)


class Problem(Protocol):
    """One task."""

    @property
    def reference(self) -> np.ndarray | None:
        """(test items,) the true numbers; None where each item is correct or not."""
        ...

    def model(self, base: str) -> SentenceReader | TextModel:
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

    def commonest(self, part: str) -> Evaluation:
        """The metrics of the commonest class, the mean number, or one answer for all."""
        ...


def packed(items: np.ndarray) -> str:
    """Items as text for a row of the result file: bits (of booleans) or float32 values, in base64."""
    if items.dtype == bool:
        return base64.b64encode(np.packbits(items).tobytes()).decode()
    return base64.b64encode(items.astype("<f4").tobytes()).decode()


def unpacked(text: str, kind: str, count: int) -> np.ndarray:
    """What `packed` made of `count` items; `kind` is "bits" or "numbers"."""
    content = base64.b64decode(text)
    if kind == "bits":
        return np.unpackbits(np.frombuffer(content, np.uint8), count=count).astype(bool)
    return np.frombuffer(content, "<f4")
