"""Metrics of what classifiers cannot be asked for, and of tokens against the definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dvora.recipes.tasks import metrics
from dvora.recipes.tasks.evaluation import simplest_guess_on
from dvora.recipes.tasks.task import task_parts
from tests.recipes.finished_runs import settings_of

KINDS = {"text-classification": ["no", "yes"], "regression": []}


def test_of_numbers_that_do_not_vary_the_correlation_is_zero() -> None:
    assert metrics.number_metrics(np.ones(3), np.arange(3.0)) == {"pearson": 0, "rmse": pytest.approx((2 / 3) ** 0.5)}
    found = metrics.of_numbers(SimpleNamespace(predictions=np.array([[1.0], [3.0]]), label_ids=np.array([2.0, 4.0])))
    assert found == {"pearson": pytest.approx(1), "rmse": pytest.approx(1)}


def test_the_simplest_guess() -> None:
    def rows(*labels: float) -> list[dict[str, float]]:
        return [{"label": label} for label in labels]

    classes, numbers = (task_parts(settings_of(name), labels, None) for name, labels in KINDS.items())
    found = simplest_guess_on(classes, rows(1, 1, 0), rows(1, 0, 0, 0), ["no", "yes"])
    assert found.metrics == {"guess": "yes", "accuracy": 0.25, "macro_f1": pytest.approx(0.2)}
    assert found.rows[:, 0].tolist() == [1, 0, 0, 0]
    found = simplest_guess_on(numbers, rows(1.0, 3.0), rows(2.0, 4.0), [])
    assert found.metrics == {"guess": 2.0, "pearson": 0.0, "rmse": pytest.approx(2**0.5)}
    assert found.rows.tolist() == [[0, 1], [4, 1]]


def test_what_abstaining_comes_to() -> None:
    logits = np.log([[0.6, 0.4], [0.1, 0.9], [0.96, 0.04], [0.3, 0.7]]).astype(np.float32)
    rows = metrics.class_rows(SimpleNamespace(predictions=logits, label_ids=np.array([1, 1, 0, 0])))
    np.testing.assert_allclose(rows[:, 2], -np.log([0.4, 0.9, 0.96, 0.3]), rtol=1e-6)
    assert metrics.answered(rows, 0.65) == {"coverage": 0.75, "answered_accuracy": pytest.approx(2 / 3)}
    assert metrics.answered(rows, 0.97) == {"coverage": 0.0}
    limits = {limit["abstain_below"]: limit["coverage"] for limit in metrics.limits_of(rows)}
    assert limits == {0.5: 1, 0.6: 1, 0.7: 0.75, 0.8: 0.5, 0.9: 0.5, 0.95: 0.25, 0.99: 0}


def test_every_token_counts_alike_whatever_batch_it_was_in() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 6, -100, -100, -100]])
    losses = [
        -logits[row, place].log_softmax(-1)[labels[row, place + 1]]
        for row, place in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    ]
    reduced = torch.cat([metrics.surprise(logits[[row]], labels[[row]]) for row in range(2)])
    found = metrics.of_tokens(SimpleNamespace(predictions=reduced.numpy()))
    mean = torch.stack(losses).mean().item()
    assert found == {"loss": pytest.approx(mean), "perplexity": pytest.approx(np.exp(mean)), "tokens": 5}
