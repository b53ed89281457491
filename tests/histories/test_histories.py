"""Random histories of single layers and small models, compared after every operation with a dense float64 shadow."""

import time

import pytest

from tests.histories.machine import History, shown

SEEDS = 25
"""In the suite; the long form goes on from there."""
LEFT_OUT: frozenset[str] = frozenset()
"""Operations to go on without, while a fault that they find hides others."""
LONG, LONG_SECONDS = 1000, 900
"""Histories with --fuzz at most, and seconds."""


@pytest.mark.parametrize("seed", range(SEEDS))
def test_after_every_operation_the_model_is_what_its_shadow_says(seed: int) -> None:
    check(History.drawn(seed, LEFT_OUT))


def test_many_histories(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--fuzz"):
        pytest.skip("with --fuzz")
    end, seed, operations = time.monotonic() + LONG_SECONDS, SEEDS, 0
    while seed < LONG and time.monotonic() < end:
        operations += check(History.drawn(seed, LEFT_OUT))
        seed += 1
    print(f"\n{seed - SEEDS} histories, {operations} operations")


def check(history: History) -> int:
    """Run a history, and shorten it where it fails."""
    done, failure = history.run()
    if failure is not None:
        pytest.fail(shown(*history.shortened(failure)), pytrace=False)
    return done
