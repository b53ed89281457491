"""Scores and their intervals against naive computations and known distributions."""

import numpy as np
import pytest

from benchmarks.quality.evaluation import packed, unpacked
from benchmarks.quality.statistics import Interval, Kind, mean_difference, paired_difference, scores

GENERATOR = np.random.default_rng(0)


def naive(kind: Kind, items: np.ndarray, reference: np.ndarray, rows: np.ndarray) -> float:
    """The score of one seed on some rows, some of them several times."""
    if kind == "accuracy":
        return 100 * float(np.mean([items[row] for row in rows]))
    return 100 * float(np.corrcoef(items[rows], reference[rows])[0, 1])


@pytest.mark.parametrize("kind", ["accuracy", "pearson"])
def test_weighted_scores_are_those_of_repeated_rows(kind: Kind) -> None:
    items = GENERATOR.random((3, 40)) + 5
    items = items > 5.5 if kind == "accuracy" else items
    reference = GENERATOR.random(40) + 1
    weights = GENERATOR.multinomial(40, np.full(40, 1 / 40), size=5).astype(float)
    rows = [np.repeat(np.arange(40), each.astype(int)) for each in weights]
    expected = [[naive(kind, seed, reference, some) for seed in items] for some in rows]
    np.testing.assert_allclose(scores(kind, items, reference, weights), expected, rtol=1e-9)


def difference(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    return mean_difference([paired_difference("accuracy", ours, theirs, np.zeros(ours.shape[1]))])


def test_the_interval_covers_the_truth_at_least_as_often_as_it_says() -> None:
    """True difference 3 points; errors of both arms go together, and seeds differ. Intervals are rather too wide."""
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        hard = generator.random(300)
        shifts = generator.normal(0, 0.01, (5, 1))
        theirs = hard > 0.25 + shifts + generator.normal(0, 0.1, (5, 300))
        ours = hard > 0.22 + shifts + generator.normal(0, 0.1, (5, 300))
        found = difference(ours, theirs)
        covered += found.low <= 3 <= found.high
    assert covered / 200 >= 0.93


@pytest.mark.parametrize("items", [GENERATOR.random(13) > 0.5, GENERATOR.random(7).astype(np.float32)])
def test_items_come_back(items: np.ndarray) -> None:
    kind = "bits" if items.dtype == bool else "numbers"
    np.testing.assert_array_equal(unpacked(packed(items), kind, len(items)), items)
