"""What training says of its progress, on a pipe: an estimate first, then each tenth of the run and each evaluation."""

import io
from contextlib import redirect_stderr

import pytest

from dvora.cli.progress import training
from dvora.recipes.training.callbacks import Progress

METRICS = {"loss": 0.5, "macro_f1": 0.25, "runtime": 3.0, "samples_per_second": 9.0}


def said(steps: int, started: int = 0, pace: float = 0.5, evaluated_at: int | None = None) -> list[str]:
    stderr = io.StringIO()
    with redirect_stderr(stderr), training(quiet=False) as on_progress:
        assert on_progress
        for step in range(started + 1, steps + 1):
            on_progress(Progress(step, steps, step - started, 0.61, pace, 10**8))
            if step == evaluated_at:
                progress = Progress(step, steps, step - started, 0.61, pace, 10**8, metrics=METRICS, is_best=True)
                on_progress(progress)
    return stderr.getvalue().splitlines()


def test_an_estimate_comes_first_and_then_each_tenth_and_each_evaluation() -> None:
    lines = said(1000, evaluated_at=104)
    assert lines[:3] == [
        "step 10 of 1000: training loss 0.61, 0.5 s a step, about 8:15 left",
        "step 100 of 1000: training loss 0.61, 7:30 left",
        "step 104 of 1000, validation: loss 0.5, macro f1 0.25 (best so far)",
    ]
    assert len(lines) == 11


@pytest.mark.parametrize(("steps", "started", "first"), [(6, 0, 1), (60, 0, 6), (1000, 500, 510)])
def test_short_runs_and_resumed_ones_have_an_estimate_too(steps: int, started: int, first: int) -> None:
    assert said(steps, started)[0].startswith(f"step {first} of {steps}: training loss 0.61, 0.5 s a step")


def test_a_long_run_prints_how_to_shorten_it() -> None:
    assert said(1000, pace=2.0)[0].endswith("about 33:00 left (--max-steps 300 would take ten minutes)")


def test_nothing_is_said_quietly() -> None:
    with training(quiet=True) as on_progress:
        assert on_progress is None
