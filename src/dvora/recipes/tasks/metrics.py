"""Metrics of predictions (classes, numbers, tokens) and of the simplest guess; those of a run as rows of a table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...tools.pages.text import shown

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]

MODELS = {"": "trained", "head_alone": "head alone, base frozen", "before_training": "before training"}
"""Names for what is evaluated, by the ending of its key in run.json."""


def only_logits(outputs: Any, labels: Any) -> Any:
    """The first of a model's outputs; some give hidden states beside them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def of_classes(evaluated: Any) -> dict[str, float]:
    """Accuracy and macro F1 of logits."""
    return class_metrics(np.asarray(evaluated.predictions).argmax(-1), np.asarray(evaluated.label_ids))


def class_metrics(predicted: Ints, labels: Ints) -> dict[str, float]:
    """Share of right predictions, and the mean F1 of the classes that occur or are predicted."""
    scores = []
    for name in np.union1d(predicted, labels):
        hits = np.sum((predicted == name) & (labels == name))
        scores.append(2 * hits / (np.sum(predicted == name) + np.sum(labels == name)))
    return {"accuracy": float(np.mean(predicted == labels)), "macro_f1": float(np.mean(scores))}


def of_numbers(evaluated: Any) -> dict[str, float]:
    """Pearson's correlation and the root mean squared error."""
    predicted = np.asarray(evaluated.predictions, dtype=np.float64).reshape(-1)
    return number_metrics(predicted, np.asarray(evaluated.label_ids, dtype=np.float64).reshape(-1))


def number_metrics(predicted: Floats, labels: Floats) -> dict[str, float]:
    """Pearson's correlation, which is taken for 0 where one side is constant, and the root mean squared error."""
    a, b = predicted - predicted.mean(), labels - labels.mean()
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return {
        "pearson": float(a @ b) / spread if spread else 0.0,
        "rmse": float(np.sqrt(np.mean((predicted - labels) ** 2))),
    }


def surprise(outputs: Any, labels: Tensor) -> Tensor:
    """Of each row the sum of the tokens' negative log-likelihoods, and their number, (rows, 2)."""
    logits: Tensor = only_logits(outputs, labels)[:, :-1].float()
    wanted = labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    return torch.stack([losses.double().sum(1), (wanted != -100).double().sum(1)], dim=1)


def of_tokens(evaluated: Any) -> dict[str, float]:
    """Mean loss of a token, which long rows count in more than short ones, and the perplexity."""
    total, tokens = np.asarray(evaluated.predictions, dtype=np.float64).sum(0)
    loss = float(total / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}


def bits_per_byte(loss: float, tokens: float, size: int) -> float:
    """The loss in a unit that does not depend on the tokenizer."""
    return loss * tokens / math.log(2) / size


def simplest_guess(train: Sequence[Any], labels: Sequence[Any], classes: Sequence[str]) -> dict[str, Any]:
    """What the commonest class of the training rows, or their mean, would get."""
    if classes:
        commonest = Counter(train).most_common(1)[0][0]
        found = class_metrics(np.full(len(labels), commonest), np.asarray(labels))
        return {"guess": classes[commonest], **found}
    mean = float(np.mean(train))
    return {"guess": mean, **number_metrics(np.full(len(labels), mean), np.asarray(labels, dtype=np.float64))}


def metric_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of a run as rows with the same columns, the baselines below what was trained."""
    names = {name: None for values in metrics.values() for name in values if name != "guess"}
    rows = []
    for key, values in metrics.items():
        part, _, compared = key.partition("_")
        model = MODELS.get(compared) or f"always {shown(values.get('guess'))}"
        rows.append({"part": part, "model": model, **{name: values.get(name) for name in names}})
    return rows
