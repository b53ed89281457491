"""How good a trained model is on held-out rows, beside the simplest guess and the model before training."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]

from .metrics import bits_per_byte, simplest_guess
from .tasks import bytes_of, without_bytes

HIDDEN = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "tokens")


def judged(trainer: Any, dataset: Dataset) -> dict[str, float]:
    """The loss and the task's metrics on a dataset."""
    size = bytes_of(dataset)
    raw = trainer.evaluate(without_bytes(dataset))
    values = {name.removeprefix("eval_"): value for name, value in raw.items() if name.startswith("eval_")}
    found = {name: value for name, value in values.items() if name not in HIDDEN}
    if size:
        found["bits_per_byte"] = bits_per_byte(values["loss"], values["tokens"], size)
    return found


def guessed(
    train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """What the commonest class of the training rows, or their mean, gets on held-out rows."""
    return simplest_guess([row["label"] for row in train], [row["label"] for row in held_out], labels)
