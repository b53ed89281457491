"""What training says of its progress, on a pipe: an estimate first, then each tenth of the run and each evaluation."""

import io
from contextlib import redirect_stderr

import pytest

from dvora.cli.progress import estimate_line, evaluation_line, shown_progress
from dvora.recipes.training.watching import Progress


def at(step: int, steps: int = 1000, pace: float = 0.5, **more: object) -> Progress:
    return Progress(step, steps, step, 0.61, pace, 10**8, **more)  # type: ignore[arg-type]


def said(steps: int, started: int = 0) -> list[str]:
    stderr = io.StringIO()
    with redirect_stderr(stderr), shown_progress(quiet=False) as on_progress:
        assert on_progress
        for step in range(started + 1, steps + 1):
            on_progress(Progress(step, steps, step - started, 0.61, 0.5, 10**8))
    return stderr.getvalue().splitlines()


def test_the_first_line_is_an_estimate_and_names_its_numbers() -> None:
    lines = said(1000)
    assert lines[0] == "step 10 of 1000: training loss 0.61, 0.5 s a step, about 8:15 left"
    assert lines[1] == "step 100 of 1000: training loss 0.61, 7:30 left"
    assert len(lines) == 10


@pytest.mark.parametrize(("steps", "started", "first"), [(6, 0, 1), (60, 0, 6), (1000, 500, 510)])
def test_short_runs_and_resumed_ones_have_an_estimate_too(steps: int, started: int, first: int) -> None:
    assert said(steps, started)[0].startswith(f"step {first} of {steps}: training loss 0.61, 0.5 s a step")


def test_a_long_run_prints_how_to_shorten_it() -> None:
    assert estimate_line(at(10, pace=2.0)).endswith("about 33:00 left (--max-steps 300 would take ten minutes)")
    assert "--max-steps" not in estimate_line(at(10))


def test_an_evaluation_names_its_part_and_metrics() -> None:
    metrics = {"loss": 0.5, "macro_f1": 0.25, "runtime": 3.0, "samples_per_second": 9.0}
    line = evaluation_line(at(504, metrics=metrics, is_best=True))
    assert line == "step 504 of 1000, validation: loss 0.5, macro f1 0.25 (best so far)"


def test_nothing_is_said_quietly() -> None:
    with shown_progress(quiet=True) as on_progress:
        assert on_progress is None
