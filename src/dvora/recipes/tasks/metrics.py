"""Metrics of predictions (classes, numbers, tokens), and those of a run as rows of a table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...text import shown
from ..data.entities import tagged

GREATER_IS_BETTER = {"accuracy": True, "f1": True, "rmse": False, "loss": False}
"""The metric that a task is judged by: the first of these that it has."""
LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Probabilities below which a report shows what abstaining comes to."""
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


def class_rows(evaluated: Any) -> Any:
    """Of each row of a trainer's logits: is it right, 1, its negative log-likelihood, its confidence, (rows, 4)."""
    logits, labels = torch.from_numpy(evaluated.predictions).double(), torch.from_numpy(evaluated.label_ids).long()
    confidence, predicted = logits.softmax(-1).max(-1)
    losses = cross_entropy(logits, labels, reduction="none")
    return torch.stack([(predicted == labels).double(), torch.ones_like(losses), losses, confidence], 1).numpy()


def number_rows(evaluated: Any) -> Any:
    """Of each row of a trainer's predictions the squared error, and 1, (rows, 2)."""
    errors = evaluated.predictions.astype(np.float64).ravel() - evaluated.label_ids.astype(np.float64)
    return np.stack([errors**2, np.ones_like(errors)], 1)


def of_classes(evaluated: Any) -> dict[str, float]:
    """`class_metrics` of a trainer's logits."""
    return class_metrics(evaluated.predictions.argmax(-1), evaluated.label_ids)


def answered(rows: Any, least: float) -> dict[str, float]:
    """Of `class_rows` the share that is answered, as their class has that probability; and the accuracy on these."""
    right = rows[rows[:, 3] >= least, 0]
    return {"coverage": len(right) / len(rows), **({"answered_accuracy": float(right.mean())} if len(right) else {})}


def limits_of(rows: Any) -> list[dict[str, float | None]]:
    """What abstaining below some probabilities comes to, to choose one by; of `class_rows`."""
    nothing = {"coverage": 0.0, "answered_accuracy": None}
    return [{"abstain_below": least, **nothing, **answered(rows, least)} for least in LIMITS]


def of_numbers(evaluated: Any) -> dict[str, float]:
    """`number_metrics` of a trainer's predictions."""
    return number_metrics(evaluated.predictions.astype(np.float64).ravel(), evaluated.label_ids.astype(np.float64))


def token_rows(evaluated: Any) -> Any:
    """`surprise` of each row, (rows, 2)."""
    return evaluated.predictions.astype(np.float64)


def of_tokens(evaluated: Any) -> dict[str, float]:
    """Mean loss of a token, which long rows count in more than short ones, and the perplexity; of `surprise`."""
    total, tokens = evaluated.predictions.astype(np.float64).sum(0)
    loss = float(total / tokens)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}


def entity_rows(evaluated: Any, tags: Sequence[str]) -> Any:
    """Of each text's `best_tags` how many entities are right, are guessed, and are true, (texts, 3).

    Args:
        evaluated: of each text tags of its tokens, by number; none is read where the label is negative.
        tags: their names.
    """
    counts = []
    for guesses_of, truths_of in zip(evaluated.predictions, evaluated.label_ids, strict=True):
        guessed, true = ({*tagged([tags[tag] for tag in row[truths_of >= 0]])} for row in (guesses_of, truths_of))
        counts.append([len(guessed & true), len(guessed), len(true)])
    return np.array(counts, np.float64).reshape(-1, 3)


def of_entities(evaluated: Any, tags: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of entities, which are right if their tokens and their label are."""
    right, guesses, truths = map(float, entity_rows(evaluated, tags).sum(0))
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
