"""Per-item predictions or losses of the test split, encoded as text for a row of the result file."""

import base64

import numpy as np


def packed(items: np.ndarray) -> str:
    """Items as text: bits (of booleans) or float32 values, in base64."""
    if items.dtype == bool:
        return base64.b64encode(np.packbits(items).tobytes()).decode()
    return base64.b64encode(items.astype("<f4").tobytes()).decode()


def unpacked(text: str, kind: str, count: int) -> np.ndarray:
    """What `packed` made of `count` items; `kind` is "bits" or "numbers"."""
    content = base64.b64decode(text)
    if kind == "bits":
        return np.unpackbits(np.frombuffer(content, np.uint8), count=count).astype(bool)
    return np.frombuffer(content, "<f4")
