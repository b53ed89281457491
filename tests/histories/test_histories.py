"""A small mixed model after any operations in any order, compared after every step with a dense float64 model."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.histories.machine import Histories

SHORT, LONG, STEPS = 25, 500, 20
"""Histories in a short run and in a long one, and the most steps of a history."""


def test_after_every_step_the_model_is_what_the_dense_model_says(request: pytest.FixtureRequest) -> None:
    is_long = request.config.getoption("--fuzz")
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=LONG if is_long else SHORT,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),  # histories take longer and draw more than single examples
            report_multiple_bugs=False,
            derandomize=not is_long,
        ),
    )
