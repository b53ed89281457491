"""Metrics against scikit-learn's and SciPy's, and of tokens against the definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score

from dvora.recipes.tasks import metrics

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(LABELS)
def test_classes_as_scikit_learn_has_them(rows: list[tuple[int, int]]) -> None:
    predicted, labels = np.array(rows).T
    found = metrics.class_metrics(predicted, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_numbers_as_scipy_has_them() -> None:
    generator = np.random.default_rng(0)
    labels = generator.normal(size=50)
    predicted = labels + generator.normal(size=50)
    found = metrics.of_numbers(SimpleNamespace(predictions=predicted[:, None], label_ids=labels))
    assert found["pearson"] == pytest.approx(pearsonr(predicted, labels).statistic)
    assert found["rmse"] == pytest.approx(np.sqrt(((predicted - labels) ** 2).mean()))
    assert metrics.number_metrics(np.ones(3), np.arange(3.0))["pearson"] == 0


def test_the_simplest_guess() -> None:
    assert metrics.simplest_guess([1, 1, 0], [1, 0, 0, 0], ["no", "yes"]) == {
        "guess": "yes",
        "accuracy": 0.25,
        "macro_f1": pytest.approx(0.2),
    }
    assert metrics.simplest_guess([1.0, 3.0], [2.0, 4.0], []) == {
        "guess": 2.0,
        "pearson": 0.0,
        "rmse": pytest.approx(2**0.5),
    }


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
    assert metrics.bits_per_byte(mean, 5, 10) == pytest.approx(mean / np.log(2) / 2)
