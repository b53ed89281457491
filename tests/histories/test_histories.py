"""A small mixed model after any operations in any order, compared after every step with a dense float64 model."""

import logging

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.histories.machine import Histories

SHORT, LONG, STEPS = 25, 500, 20
"""Histories in a short run, in a long one, and the steps of a history, of which 15 have to be made to count."""


def run(histories: int, **options: object) -> None:
    """Run histories; Hypothesis shortens some of them."""
    health = list(HealthCheck)  # histories take longer and draw more than single examples
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=histories,
            stateful_step_count=STEPS,
            suppress_health_check=health,
            report_multiple_bugs=False,
            **options,
        ),
    )


def counted() -> int:
    return sum(steps >= 15 for steps in Histories.steps_of_histories)


def test_after_every_step_the_model_is_what_the_dense_model_says(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "torch.__trace")  # the compiler's, of which pytest would keep every line
    Histories.steps_of_histories.clear()
    Histories.steps_by_rule.clear()
    if request.config.getoption("--fuzz"):
        while counted() < LONG:
            run(100, derandomize=False)
    else:
        run(SHORT)
    assert counted() >= SHORT // 2
    print(f"\n{counted()} histories of 15 to {STEPS} steps, {sum(Histories.steps_by_rule.values())} steps:")
    print(", ".join(f"{name} {times}" for name, times in sorted(Histories.steps_by_rule.items())))
