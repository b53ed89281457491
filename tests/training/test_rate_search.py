"""A search leaves its centre where another rate is clearly better, within the steps that it said beforehand."""

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvora.training import RateSearch, RateTrial, find_rate, rate_plan
from dvora.training.rate_search import LEAST_STEPS, SHARE, shortest_run

LONG = 1250
"""Steps of a run with as many trials as there can be."""
CENTER = 0.01


class Loop:
    """A training loop whose loss is lowest at one rate, and which diverges from another one on.

    Args:
        lowest: the rate of the lowest loss.
        diverges: from this rate on the loss is `bad`.
    """

    def __init__(self, lowest: float, diverges: float = math.inf, bad: float = math.nan) -> None:
        self.lowest, self.diverges, self.bad = lowest, diverges, bad
        self.calls: list[tuple[float, int]] = []

    def __call__(self, rate: float, steps: int) -> float:
        self.calls.append((rate, steps))
        return self.bad if rate >= self.diverges else abs(math.log(rate / self.lowest))

    @property
    def rates(self) -> list[float]:
        return [rate for rate, _ in self.calls]


@pytest.mark.parametrize(
    ("lowest", "rates", "chosen"),
    [
        # The centre is the best, or as good as.
        (0.01, [0.0033, 0.01, 0.03], 0.01),
        (0.018, [0.0033, 0.01, 0.03], 0.01),
        (0.0055, [0.0033, 0.01, 0.03], 0.01),
        # Beyond an edge, and again.
        (0.02, [0.0033, 0.01, 0.03, 0.09], 0.03),
        (0.005, [0.0033, 0.01, 0.03, 0.0011], 0.0033),
        (0.1, [0.0033, 0.01, 0.03, 0.09, 0.27], 0.09),
        (1.0, [0.0033, 0.01, 0.03, 0.09, 0.27], 0.27),
        (1e-9, [0.0033, 0.01, 0.03, 0.0011, 0.00037], 0.00037),
    ],
)
def test_trials_go_where_the_best_one_points(lowest: float, rates: list[float], chosen: float) -> None:
    loop = Loop(lowest)
    found = find_rate(loop, LONG, center=CENTER)
    assert (loop.rates, found.rate) == (rates, chosen)
    assert [trial.rate for trial in found.trials] == rates


def test_a_search_from_another_centre() -> None:
    loop = Loop(5e-5)
    assert find_rate(loop, LONG, center=4.7e-5).rate == 4.7e-5
    assert loop.rates[:3] == [1.6e-05, 4.7e-05, 0.00014]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_trial_that_diverged_is_the_worst(bad: float) -> None:
    loop = Loop(1.0, diverges=0.02, bad=bad)
    found = find_rate(loop, LONG, center=CENTER)
    assert (found.rate, loop.rates) == (0.01, [0.0033, 0.01, 0.03])
    assert [trial.loss for trial in found.trials if trial.rate == 0.03] == [math.inf]


def test_a_search_goes_down_until_something_is_finite() -> None:
    loop = Loop(1.0, diverges=0.001)
    assert find_rate(loop, LONG, center=CENTER).rate == 0.00037
    assert loop.rates == [0.0033, 0.01, 0.03, 0.0011, 0.00037]


def test_a_search_in_which_everything_diverges_is_an_error() -> None:
    loop = Loop(1.0, diverges=0.0)
    with pytest.raises(ValueError, match=r"diverged in every trial, at learning rates from 0.00037 to 0.03; check"):
        find_rate(loop, LONG, center=CENTER)
    assert len(loop.calls) == 5


@pytest.mark.parametrize(("loss", "chosen"), [(1.0, CENTER), (0.92, CENTER), (0.88, 0.03)])
def test_the_centre_stays_unless_another_rate_is_better_by_a_tenth_of_the_spread(loss: float, chosen: float) -> None:
    losses = {0.0033: 2.0, CENTER: 1.0, 0.03: loss, 0.09: 1.5}
    assert find_rate(lambda rate, steps: losses[rate], LONG, center=CENTER).rate == chosen


def test_of_equal_losses_the_one_at_the_centre_is_taken() -> None:
    assert find_rate(lambda rate, steps: 1.0, LONG, center=CENTER).rate == CENTER


def test_a_rate_that_trains_is_better_than_a_centre_that_diverged() -> None:
    assert find_rate(Loop(1.0, diverges=0.005), LONG, center=CENTER).rate == 0.0033


def test_every_trial_has_the_steps_of_the_plan() -> None:
    loop, plan = Loop(1.0), rate_plan(LONG)
    found = find_rate(loop, LONG, center=CENTER)
    assert len(loop.calls) == plan.trials == 5
    assert {steps for _, steps in loop.calls} == {plan.steps} == {found.steps} == {50}


@pytest.mark.parametrize(
    ("steps", "trials", "each"),
    [(1250, 5, 50), (1000, 4, 50), (999, 3, 66), (500, 3, 33), (240, 3, 16), (120, 3, 8), (119, 0, 0), (1, 0, 0)],
)
def test_the_plan_of_a_run(steps: int, trials: int, each: int) -> None:
    plan = rate_plan(steps)
    assert (plan.trials, plan.steps, plan.run_steps) == (trials, each, steps)


@given(st.integers(1, 10**7), st.floats(0.01, 1.0))
def test_a_search_never_costs_more_than_its_share(steps: int, share: float) -> None:
    plan = rate_plan(steps, share)
    assert plan.trials * plan.steps <= share * steps
    assert plan.share == plan.trials * plan.steps / steps
    assert plan.trials in (0, 3, 4, 5)
    assert plan.steps >= LEAST_STEPS or not plan.trials
    if plan.trials:
        calls = Loop(1.0)
        find_rate(calls, steps, share=share)
        assert sum(each for _, each in calls.calls) <= share * steps


@pytest.mark.parametrize("share", [SHARE, 0.1, 0.5, 1.0])
def test_the_shortest_run_with_a_search(share: float) -> None:
    assert rate_plan(shortest_run(share), share).trials
    assert not rate_plan(shortest_run(share) - 1, share).trials
    with pytest.raises(ValueError, match=f"too short a run for trials: with share {share:g} it takes"):
        find_rate(Loop(1.0), shortest_run(share) - 1, share=share)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loop: find_rate(loop, 0), "steps is 0, expected the number of steps of the run"),
        (lambda loop: find_rate(loop, LONG, share=0.0), "share is 0.0, expected the share of the run's steps"),
        (lambda loop: find_rate(loop, LONG, share=math.nan), "share is nan"),
        (lambda loop: find_rate(loop, LONG, share=1.5), "share is 1.5"),
        (lambda loop: find_rate(loop, LONG, center=0.0), "center is 0.0, expected a finite rate above zero"),
        (lambda loop: find_rate(loop, LONG, center=math.inf), "center is inf"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(call: Callable[[Loop], object], message: str) -> None:
    loop = Loop(1.0)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(loop)
    assert not loop.calls


def test_an_error_of_a_trial_is_the_caller_s() -> None:
    def broken(rate: float, steps: int) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_rate(broken, LONG)


def test_a_search_as_a_record() -> None:
    search = RateSearch(0.01, 40, (RateTrial(0.01, 0.5), RateTrial(0.03, math.inf)))
    assert search.to_dict() == {
        "rate": 0.01,
        "steps": 40,
        "trials": [{"rate": 0.01, "loss": 0.5}, {"rate": 0.03, "loss": None}],
    }
