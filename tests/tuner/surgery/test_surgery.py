"""Surgery on a small mixed model, in any order, compared after every step with a dense float64 model."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from surgery_machine import Surgery


def test_every_history_ends_as_the_dense_model_says(request: pytest.FixtureRequest) -> None:
    histories = 600 if request.config.getoption("--fuzz") else 30
    Surgery.steps_of_histories.clear()
    run_state_machine_as_test(
        Surgery,
        settings=settings(
            max_examples=histories, stateful_step_count=20, suppress_health_check=list(HealthCheck), deadline=None, report_multiple_bugs=False
        ),
    )
    long = sum(steps >= 15 for steps in Surgery.steps_of_histories)
    print(f"{long} histories of 15 steps or more; steps: {dict(sorted(Surgery.steps_by_rule.items()))}")
    assert long >= histories * 5 // 6
