"""Metrics of predictions (classes, numbers, tokens), and those of a run as rows of a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...text import shown
from ..data.entities import tagged

GREATER_IS_BETTER = {"accuracy": True, "f1": True, "rmse": False, "loss": False}
"""The metric that a task is judged by: the first of these that it has."""
MODELS = {
    "": "trained",
    "head_alone": "head alone, base frozen",
    "before_training": "before training",
    "not_saved": "trained, not saved",
}
"""Names for what is evaluated, by the ending of its key in run.json."""


def class_metrics(predicted: Any, labels: Any) -> dict[str, float]:
    """Share of right predictions, and the mean F1 of the classes that occur or are predicted."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro")),
    }


def number_metrics(predicted: Any, labels: Any) -> dict[str, float]:
    """Pearson's correlation, which is taken for 0 where one side is constant, and the root mean squared error."""
    from sklearn.metrics import root_mean_squared_error

    varies = np.ptp(predicted) and np.ptp(labels)
    return {
        "pearson": float(np.corrcoef(predicted, labels)[0, 1]) if varies else 0.0,
        "rmse": float(root_mean_squared_error(labels, predicted)),
    }


def of_classes(evaluated: Any) -> dict[str, float]:
    """`class_metrics` of a trainer's logits."""
    return class_metrics(evaluated.predictions.argmax(-1), evaluated.label_ids)


def of_answered_classes(evaluated: Any, least: float) -> dict[str, float]:
    """`of_classes`; the share of rows that are answered, as their class has that probability; and their accuracy."""
    confidence, predicted = torch.from_numpy(evaluated.predictions).float().softmax(-1).max(-1)
    answered = confidence >= least
    right = (predicted == torch.from_numpy(evaluated.label_ids))[answered].double()
    accuracy = {"answered_accuracy": float(right.mean())} if len(right) else {}
    return {**of_classes(evaluated), "coverage": float(answered.double().mean()), **accuracy}


def of_numbers(evaluated: Any) -> dict[str, float]:
    """`number_metrics` of a trainer's predictions."""
    return number_metrics(evaluated.predictions.astype(np.float64).ravel(), evaluated.label_ids.astype(np.float64))


def of_tokens(evaluated: Any) -> dict[str, float]:
    """Mean loss of a token, which long rows count in more than short ones, and the perplexity; of `surprise`."""
    total, tokens = evaluated.predictions.astype(np.float64).sum(0)
    loss = float(total / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}


def of_entities(evaluated: Any, tags: Sequence[str]) -> dict[str, float]:
    """`entity_metrics` of a trainer's `best_tags`."""
    return entity_metrics(evaluated.predictions, evaluated.label_ids, tags)


def entity_metrics(predicted: Iterable[Any], labels: Iterable[Any], tags: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of entities, which are right if their tokens and their label are.

    Args:
        predicted, labels: of each text the tags of its tokens, by number; none is read where the label is negative.
        tags: their names.
    """
    counts = np.zeros(3)
    for guesses_of, truths_of in zip(predicted, labels, strict=True):
        guessed, true = ({*tagged([tags[tag] for tag in row[truths_of >= 0]])} for row in (guesses_of, truths_of))
        counts += len(guessed & true), len(guessed), len(true)
    right, guesses, truths = map(float, counts)
    return {
        "f1": 2 * right / max(1, guesses + truths),
        "precision": right / max(1, guesses),
        "recall": right / max(1, truths),
    }


def best_tags(outputs: Any, labels: Any) -> Tensor:
    """The likeliest tag of each token."""
    best: Tensor = only_logits(outputs, labels).argmax(-1)
    return best


def only_logits(outputs: Any, labels: Any) -> Any:
    """The first of a model's outputs; some give hidden states beside them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def surprise(outputs: Any, labels: Tensor) -> Tensor:
    """Of each row the sum of the tokens' negative log-likelihoods, and their number, (rows, 2)."""
    logits: Tensor = only_logits(outputs, labels)[:, :-1].float()
    wanted = labels[:, 1:]
    losses = cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=-100)
    return torch.stack([losses.double().sum(1), (wanted != -100).double().sum(1)], dim=1)


def metric_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of a run as rows with the same columns, the baselines below what was trained, or is saved."""
    names = {name: None for values in metrics.values() for name in values if name != "guess"}
    rows = []
    for key, values in metrics.items():
        part, _, compared = key.partition("_")
        model = (
            "saved" if f"{key}_not_saved" in metrics else MODELS.get(compared) or f"always {shown(values.get('guess'))}"
        )
        rows.append({"part": part, "model": model, **{name: values.get(name) for name in names}})
    return rows
