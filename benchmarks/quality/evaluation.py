"""What an evaluation of a split gives, and how a row of the result file holds its items."""

import base64
from dataclasses import dataclass, field

import numpy as np


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
