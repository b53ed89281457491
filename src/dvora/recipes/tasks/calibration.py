"""Probabilities that are as often right as they say: temperature scaling (Guo et al., 2017), put into the head.

A last linear layer that is divided by the temperature gives calibrated logits wherever it goes: a bank, a graph, PEFT.

Dimensions: N rows, C classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...tensors import Float

BINS, ROWS_OF_BIN = 15, 10
"""Of the calibration error: bins at most, and rows of one at least; a bin without rows would hide an error."""
FEWEST, FOLDS = 20, 5
"""Validation rows without which no temperature is fitted: it would make more losses worse than better (LOG.md)."""
LOWEST, HIGHEST = 0.01, 100.0
"""Of temperatures: rows that are nearly all right or no better than chance have none that is best."""


def fitted_temperature(logits: Float[Tensor, "N C"], labels: Tensor) -> float:
    """The number that logits divided by have the least negative log-likelihood; 1 if all rows are right.

    Args:
        logits: of rows that the model was not trained on.
        labels: their classes, (N,).
    """
    if bool((logits.argmax(-1) == labels).all()):
        return 1.0
    logits, inverse = logits.double(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(logits * inverse.exp(), labels)
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)
    return float((-inverse.detach()).exp().clamp(LOWEST, HIGHEST))


def chosen_temperature(logits: Float[Tensor, "N C"], labels: Tensor) -> tuple[float, float]:
    """The fitted temperature if fits to four fifths of the rows lower the loss of the fifth that they have not seen.

    Returns:
        It, else 1; and by how much the loss of an unseen row fell, 0 if there are fewer than `FEWEST` rows.
    """
    if len(labels) < FEWEST:
        return 1.0, 0.0
    logits, fold, fell = logits.double(), torch.arange(len(labels)) % FOLDS, 0.0
    for number in range(FOLDS):
        unseen = fold == number
        divisor = fitted_temperature(logits[~unseen], labels[~unseen])
        before, after = (cross_entropy(logits[unseen] / by, labels[unseen], reduction="sum") for by in (1.0, divisor))
        fell += float(before - after) / len(labels)
    return (fitted_temperature(logits, labels) if fell > 0 else 1.0), fell


def calibration_error(logits: Float[Tensor, "N C"], labels: Tensor) -> float | None:
    """Expected calibration error: how far confidence is from accuracy, in bins of equally many rows by confidence.

    Returns:
        The mean gap; None of fewer than three bins of `ROWS_OF_BIN`.
    """
    bins = min(BINS, len(labels) // ROWS_OF_BIN)
    if bins < 3:
        return None
    confidence, predicted = logits.double().softmax(-1).max(-1)
    gaps = ((predicted == labels).double() - confidence)[confidence.argsort(stable=True)]
    return float(sum(part.sum().abs() for part in gaps.tensor_split(bins)) / len(labels))


def calibrate(trainer: Any, layer: nn.Linear, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Divide a model's last layer by the temperature that its validation rows prefer, if they prefer any.

    Args:
        trainer: of the trained model.
        layer: which gives the model's logits.
        datasets: inputs of "validation" and, where there are rows, of "test", on which nothing is fitted.

    Returns:
        For run.json: the temperature, rows, and the calibration error of the test rows before and after.
    """
    logits, labels = _logits(trainer, datasets["validation"])
    temperature, fell = chosen_temperature(logits, labels)
    record: dict[str, Any] = {"temperature": temperature, "validation_rows": len(labels), "loss_fell_by": fell}
    if "test" in datasets:
        logits, labels = _logits(trainer, datasets["test"])
        record["test_rows"] = len(labels)
        before, after = (calibration_error(logits / divisor, labels) for divisor in (1.0, temperature))
        if before is not None:
            record |= {"test_calibration_error_before": before, "test_calibration_error_after": after}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.div_(temperature)
    return record


def calibration_sentence(record: Mapping[str, float]) -> str:
    """What `calibrate` did, of what it recorded."""
    temperature, rows = record["temperature"], record.get("validation_rows")
    if temperature != 1:
        done = f"Calibrated by a temperature of {temperature:.3g}"
    elif rows is not None and rows < FEWEST:
        done = f"Not calibrated: a temperature is fitted to {FEWEST} validation rows or more, here are {rows}"
    else:
        done = "Not calibrated: no temperature lowers the loss of validation rows that it was not fitted to"
    if (before := record.get("test_calibration_error_before")) is None:
        return done
    after = record["test_calibration_error_after"]
    errors = f"{before:.3f}" if before == after else f"{before:.3f}, now {after:.3f}"
    return f"{done}; calibration error of {record.get('test_rows', 0):,} test rows: {errors}"


def _logits(trainer: Any, dataset: Any) -> tuple[Tensor, Tensor]:
    predicted = trainer.predict(dataset)
    return torch.from_numpy(predicted.predictions).float(), torch.from_numpy(predicted.label_ids).long()
