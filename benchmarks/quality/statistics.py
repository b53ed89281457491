"""Scores with their uncertainty: means over seeds, and paired differences over seeds and test items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats

Kind = Literal["accuracy", "pearson"]
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def over_seeds(scores: np.ndarray) -> Interval:
    """Mean of (seeds,) scores, or of tasks', with Student's interval; a single one has none, it is at both ends."""
    mean = float(scores.mean())
    if len(scores) < 2:
        return Interval(mean, mean, mean)
    half = stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / np.sqrt(len(scores))
    return Interval(mean, mean - float(half), mean + float(half))


@dataclass(frozen=True)
class Difference:
    """A mean difference, and what it is when seeds and items are drawn anew, (draws,)."""

    mean: float
    drawn: np.ndarray


def mean_difference(differences: Sequence[Difference]) -> Interval:
    """The mean of differences on several tasks, with its percentile interval."""
    low, high = np.percentile(np.mean([each.drawn for each in differences], axis=0), [2.5, 97.5])
    return Interval(float(np.mean([each.mean for each in differences])), float(low), float(high))


def paired_difference(kind: Kind, ours: np.ndarray, theirs: np.ndarray, reference: np.ndarray) -> Difference:
    """Mean score of ours minus that of theirs, and its bootstrap over seeds and items.

    Both are drawn anew together: the same seeds and the same items for both sides, since both were trained on the same
    batches and evaluated on the same items. Drawing rows and columns counts the noise of a single cell more than once,
    so that the interval is rather too wide (Owen 2007, "The pigeonhole bootstrap").

    Args:
        kind: what the score is; see `scores`.
        ours, theirs: (seeds, items) of the same seeds in the same order.
        reference: (items,) as `scores` needs it.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    seeds, items = ours.shape
    of_items, of_seeds = _draws(items), _draws(seeds).astype(np.float64) / seeds
    both = np.concatenate([ours, theirs])
    drawn = (_paired(scores(kind, both, reference, of_items), seeds) * of_seeds).sum(1)
    mean = _paired(scores(kind, both, reference, np.ones((1, items), np.float32)), seeds).mean()
    return Difference(float(mean), drawn)


def _paired(both: np.ndarray, seeds: int) -> np.ndarray:
    """(draws, seeds): the scores of the first seeds minus those of the others."""
    difference: np.ndarray = both[:, :seeds] - both[:, seeds:]
    return difference


@lru_cache(maxsize=16)
def _draws(count: int) -> np.ndarray:
    """(resamples, count) how often each of `count` things is drawn, with replacement; the same in every call."""
    generator = np.random.default_rng(count)
    drawn: np.ndarray = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float32)
    return drawn


def scores(kind: Kind, items: np.ndarray, reference: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws, seeds) scores of weighted items, where more is better.

    Args:
        kind: "accuracy" (in %) of items that are correct or not, or "pearson" (times 100) of predicted numbers.
        items: (seeds, items).
        reference: (items,) true numbers for "pearson"; not read for "accuracy".
        weights: (draws, items), how often each item is drawn, in float32; as many items in every draw.
    """
    total = weights[0].sum(dtype=np.float64)
    if kind == "accuracy":
        # Counts, of which float32 has every digit.
        share: np.ndarray = 100 * (weights @ items.T.astype(np.float32)).astype(np.float64) / total
        return share
    weights = weights.astype(np.float64)
    # Centred first, so that the moments lose no digits.
    x = items.T.astype(np.float64) - items.mean(1)
    y = (reference - reference.mean())[:, None].astype(np.float64)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    covariance = weights @ (x * y) / total - mean_x * mean_y
    variances = (weights @ (x * x) / total - mean_x**2) * (weights @ (y * y) / total - mean_y**2)
    correlation: np.ndarray = 100 * covariance / np.sqrt(np.maximum(variances, 1e-30))
    return correlation
