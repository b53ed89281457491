"""Two models on the same rows: outcomes that hold, intervals that cover, and a choice without test rows."""

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dvora.recipes.tasks.comparison import METRICS, Comparison, compared, comparisons, is_preferred


def classes(right: int, rows: int, loss: float = 0.5) -> np.ndarray:
    """So many right rows, first the right ones."""
    return np.stack([np.arange(rows) < right, np.ones(rows), np.full(rows, loss), np.full(rows, 0.9)], 1).astype(float)


@pytest.mark.parametrize(
    ("right", "other", "rows", "outcome"),
    [
        (10, 7, 14, "cannot tell"),
        (14, 13, 14, "cannot tell"),
        (14, 14, 14, "cannot tell"),
        (668, 588, 800, "better"),
        (588, 668, 800, "no better"),
        # Ties, of many rows that all agree.
        (700, 700, 800, "no better"),
        (1, 0, 1, "cannot tell"),
        (0, 0, 1, "cannot tell"),
        # A model that is perfect.
        (800, 800, 800, "no better"),
        (800, 760, 800, "better"),
        # Five rows that differ are never significant, six are.
        (14, 9, 14, "cannot tell"),
        (14, 8, 14, "better"),
    ],
)
def test_what_can_be_told(right: int, other: int, rows: int, outcome: str) -> None:
    found = compared("accuracy", classes(right, rows), classes(other, rows))
    assert found.outcome == outcome
    assert found.gain == pytest.approx((right - other) / rows)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.gain <= found.high
    assert found.needed is not None
    assert outcome != "cannot tell" or found.needed > min(rows, 5)


@given(wins=st.integers(0, 60), losses=st.integers(0, 60), agree=st.integers(1, 400))
def test_better_is_what_the_exact_sign_test_says_too(wins: int, losses: int, agree: int) -> None:
    first = classes(wins, wins + losses + agree)
    second = first.copy()
    second[: wins + losses, 0] = 1 - first[: wins + losses, 0]
    found, back = compared("accuracy", first, second), compared("accuracy", second, first)
    assert (found.gain, found.low, found.high) == pytest.approx((-back.gain, -back.high, -back.low))
    p = stats.binomtest(wins, max(1, wins + losses)).pvalue
    assert found.outcome != "better" or (wins > losses and p <= 0.05)
    assert found.low is not None
    assert found.high is not None
    if p > 0.05:
        assert found.low <= 0 <= found.high


def drawn(metric: str, rows: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two models on random rows, which are as hard for the one as for the other."""
    hard = random.gamma(2, 1, rows)
    if metric == "f1":
        true = random.integers(0, 4, rows)
        right = [random.binomial(true, share) for share in (0.8, 0.7)]
        return tuple(np.stack([of, of + random.poisson(0.4, rows), true], 1).astype(float) for of in right)
    if metric == "accuracy":
        return tuple(
            np.stack([hard < easy * random.uniform(0.7, 1.3, rows), np.ones(rows)], 1).astype(float) for easy in (3, 2)
        )
    weight = random.integers(5, 60, rows) if metric == "loss" else np.ones(rows)
    return tuple(np.stack([weight * (hard * of + random.gamma(1, 0.3, rows)), weight], 1) for of in (0.8, 1.0))


@pytest.mark.parametrize("metric", [*METRICS])
def test_intervals_cover_the_difference_about_as_often_as_they_say(metric: str) -> None:
    """More closely in benchmarks/results/conclusions.json."""
    random = np.random.default_rng(0)
    first, second = drawn(metric, 400_000, random)
    sign = 1 if metric in ("accuracy", "f1") else -1
    true = sign * (METRICS[metric](first.sum(0)) - METRICS[metric](second.sum(0)))
    found = [compared(metric, *drawn(metric, 60, random)) for _ in range(150)]
    covered = np.mean([one.low <= true <= one.high for one in found])
    assert 0.88 <= covered <= 0.99


def test_of_errors_less_is_better_and_few_rows_tell_nothing() -> None:
    random = np.random.default_rng(1)
    errors = np.stack([random.chisquare(1, 300), np.ones(300)], 1)
    found = compared("rmse", errors * [0.25, 1], errors)
    assert found.outcome == "better"
    assert found.gain == pytest.approx(METRICS["rmse"](errors.sum(0)) / 2)
    assert compared("rmse", errors, errors).outcome == "no better"
    assert compared("rmse", errors[:1], errors[1:2]) == Comparison(
        compared("rmse", errors[:1], errors[1:2]).gain, None, None, 1, None, "cannot tell"
    )


@pytest.mark.parametrize("value", [nan, inf])
def test_a_model_that_diverged_is_no_better(value: float) -> None:
    diverged = np.array([[value, 1.0], [1.0, 1.0]])
    fine = np.ones((2, 2))
    assert compared("loss", diverged, fine).outcome == "no better"
    assert compared("loss", fine, diverged).outcome == "cannot tell"


def test_rows_that_are_needed_tell_such_a_gain_from_chance() -> None:
    found = compared("accuracy", classes(72, 100), classes(68, 100))
    assert found.outcome == "cannot tell"
    assert found.needed is not None
    more = found.needed / 100
    again = compared("accuracy", classes(round(72 * more), found.needed), classes(round(68 * more), found.needed))
    assert again.outcome == "better"


def test_every_baseline_is_compared_with_what_was_trained_on_its_part() -> None:
    rows = {
        "validation": classes(5, 10),
        "validation_head_alone": classes(5, 10),
        "test": classes(668, 800),
        "test_head_alone": classes(588, 800),
        "test_simplest_guess": classes(668, 800),
    }
    found = comparisons("accuracy", rows)
    assert [*found] == ["validation_head_alone", "test_head_alone", "test_simplest_guess"]
    assert [value["outcome"] for value in found.values()] == ["cannot tell", "better", "no better"]


def test_validation_rows_alone_choose_what_is_saved() -> None:
    better, worse = classes(13, 15), classes(12, 15)
    assert is_preferred("accuracy", {"validation": better, "validation_head_alone": worse})
    # What the test rows say is not asked.
    for test in (classes(0, 14), classes(14, 14)):
        chosen = {"validation": better, "validation_head_alone": worse, "test": test, "test_head_alone": classes(7, 14)}
        assert is_preferred("accuracy", chosen)
    assert not is_preferred("accuracy", {"validation": worse, "validation_head_alone": better})
    # Equal: by the loss, then the head.
    for trained, head, preferred in ((0.4, 0.5, True), (0.5, 0.4, False), (0.5, 0.5, False), (nan, 0.5, False)):
        rows = {"validation": classes(9, 15, trained), "validation_head_alone": classes(9, 15, head)}
        assert is_preferred("accuracy", rows) is preferred
    assert is_preferred("accuracy", {"test": worse, "test_head_alone": better})
    assert is_preferred("loss", {})
    errors = np.ones((5, 2))
    assert is_preferred("rmse", {"validation": errors * [0.5, 1], "validation_head_alone": errors})
    assert not is_preferred("rmse", {"validation": errors, "validation_head_alone": errors})
