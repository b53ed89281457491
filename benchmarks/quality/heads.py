"""The linear head that is best for frozen features: where every method starts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor, nn

from materials.fetch import build_once

# Strengths tried on the validation rows: 1 / C of the logistic regression, alpha of the ridge regression.
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def fitted_head(name: str, parts: Sequence[tuple[Tensor, Callable[[], Tensor]]], outputs: int) -> nn.Linear:
    """A head fitted once and kept in the cache.

    Args:
        name: of the task and its sizes.
        parts: labels, and what computes the features, of training and validation.
        outputs: classes (three or more), or 1 for a number.
    """

    def build(folder: Path) -> None:
        (train_labels, train), (labels, checked) = [(labels, features()) for labels, features in parts]
        weight, bias = best_linear(
            (train.numpy(), train_labels.numpy()),
            (checked.numpy(), labels.numpy()),
            outputs,
        )
        save_file({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}, folder / "head.safetensors")

    values = load_file(build_once(f"quality-head-{name}", build) / "head.safetensors")
    head: nn.Linear = nn.utils.skip_init(nn.Linear, values["weight"].shape[1], outputs)
    head.load_state_dict(values)
    return head


def best_linear(
    train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray], outputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (outputs, features) and bias (outputs,), float32, of the penalty with the lowest validation loss."""
    mean, scale = train[0].mean(0), train[0].std(0)
    # MiniLM has a feature that is always zero.
    scale = np.where(scale > 1e-6 * scale.max(), scale, 1.0)
    features, checked = ((each - mean) / scale for each in (train[0], validation[0]))
    tried = [_fitted(features, train[1], penalty, outputs) for penalty in PENALTIES]
    weight, bias = min(tried, key=lambda each: _loss(checked @ each[0].T + each[1], validation[1], outputs))
    weight = weight / scale
    return np.ascontiguousarray(weight, np.float32), (bias - weight @ mean).astype(np.float32)


def _fitted(features: np.ndarray, labels: np.ndarray, penalty: float, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (outputs, features) and bias (outputs,) of a regression with this penalty."""
    if outputs == 1:
        ridge = Ridge(alpha=penalty).fit(features, labels)
        return ridge.coef_[None], np.atleast_1d(ridge.intercept_)
    classifier = LogisticRegression(C=1 / penalty, max_iter=2000).fit(features, labels)
    return classifier.coef_, classifier.intercept_


def _loss(outputs: np.ndarray, labels: np.ndarray, count: int) -> float:
    predicted, target = torch.from_numpy(outputs).double(), torch.from_numpy(labels)
    if count == 1:
        return ((predicted[:, 0] - target).square() / 2).mean().item()
    return nn.functional.cross_entropy(predicted, target).item()
