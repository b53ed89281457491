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

BINS = 15
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


def calibration_error(logits: Float[Tensor, "N C"], labels: Tensor) -> float:
    """Expected calibration error: how far confidence is from accuracy, in bins of equal width, weighted by rows."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = (predicted == labels).double() - confidence
    return float(torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, gaps).abs().sum() / len(labels))


def calibrate(trainer: Any, layer: nn.Linear, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Divide a model's last layer by the temperature that its validation rows prefer.

    Args:
        trainer: of the trained model.
        layer: which gives the model's logits.
        datasets: inputs of "validation" and, where there are rows, of "test", on which nothing is fitted.

    Returns:
        For run.json: the temperature, and the expected calibration error of the test rows before and after.
    """
    temperature = fitted_temperature(*_logits(trainer, datasets["validation"]))
    record: dict[str, Any] = {"temperature": temperature}
    if "test" in datasets:
        logits, labels = _logits(trainer, datasets["test"])
        before, after = (calibration_error(logits / divisor, labels) for divisor in (1.0, temperature))
        record |= {"test_calibration_error_before": before, "test_calibration_error_after": after}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.div_(temperature)
    return record


def _logits(trainer: Any, dataset: Any) -> tuple[Tensor, Tensor]:
    predicted = trainer.predict(dataset)
    return torch.from_numpy(predicted.predictions).float(), torch.from_numpy(predicted.label_ids).long()
