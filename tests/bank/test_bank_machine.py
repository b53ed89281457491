"""Histories of a bank, in any order, compared after every step with a plain dictionary of merged models."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.bank.bank_machine import CLOSE, BankMachine, saved_versions

SHORT, LONG, STEPS = 25, 500, 20
"""Histories in a short run and in a long one, and their steps."""


def test_versions_differ_by_more_than_any_rounding() -> None:
    versions = saved_versions().versions
    every = [versions.base, *versions.expected]
    distances = [float((a - b).abs().max()) for i, a in enumerate(every) for b in every[:i]]
    assert min(distances) > 10 * max(CLOSE.values())


def test_after_every_step_the_bank_serves_what_the_dictionary_says(request: pytest.FixtureRequest) -> None:
    BankMachine.steps_by_rule.clear()
    is_long = request.config.getoption("--fuzz")
    run_state_machine_as_test(
        BankMachine,
        settings=settings(
            max_examples=LONG if is_long else SHORT,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
            derandomize=not is_long,
            database=None,
        ),
    )
    done = BankMachine.steps_by_rule
    assert done["begin"] >= (LONG if is_long else SHORT)
    assert not is_long or min(done[step] for step in ("batch", "replace", "begin a batch", "add pack")) > 40
    print(f"\n{sum(done.values())} steps: {', '.join(f'{name} {times}' for name, times in sorted(done.items()))}")
