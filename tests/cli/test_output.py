"""What commands show: tables, notes and progress on a terminal or a pipe, and how they end."""

import io
import signal
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import typer

from dvora.cli.errors import INTERRUPTED, one_line
from dvora.cli.output import Output, results_alone
from dvora.cli.progress import training
from dvora.recipes.training.callbacks import Progress

NAME = "bert.encoder.layer.10.attention.output.dense"
METRICS = {"loss": 0.5, "macro_f1": 0.25, "runtime": 3.0, "samples_per_second": 9.0}


def shown(columns: int, monkeypatch: pytest.MonkeyPatch, **more: object) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    stdout = io.StringIO()
    rows = [{"layer": NAME, "two words": 1.25, "remark": "a sentence of several words that is long enough to fold"}]
    with redirect_stdout(stdout):
        Output().result({"some_name": 3, "layers": rows}, "Title", **more)  # type: ignore[arg-type]
    return stdout.getvalue()


@pytest.mark.parametrize("columns", [40, 200])
def test_names_are_whole_however_narrow_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(columns, monkeypatch, legend={"angle": "how far rows turned"}, verdict="Verdict: fine")
    for part in (NAME, "1.25", "two words", "some name", "how far rows turned"):
        assert part in text
    assert text.splitlines()[-1] == "Verdict: fine"
    lines = [line.rstrip() for line in shown(columns, monkeypatch).splitlines()]
    assert (len([line for line in lines if line]) > 5) == (columns < 200)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (Output(), "Next: dvora report 'my run'  (a page)\n"),
        (Output(quiet=True), ""),
        (Output(as_json=True), ""),
    ],
    ids=["tables", "quiet", "json"],
)
def test_the_next_command_can_be_copied(output: Output, expected: str) -> None:
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        output.next_step("dvora", "report", "my run", why="a page")
    assert stderr.getvalue() == expected


def test_what_libraries_print_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with results_alone():
        print("loading")
        Output(as_json=True).result({"a": 1})
    assert capsys.readouterr() == ('{"a": 1}\n', "loading\n")


def said(steps: int, started: int = 0, pace: float = 0.5, evaluated_at: int | None = None) -> list[str]:
    """What training says of its progress, on a pipe."""
    stderr = io.StringIO()
    with redirect_stderr(stderr), training(quiet=False) as on_progress:
        assert on_progress
        for step in range(started + 1, steps + 1):
            on_progress(Progress(step, steps, step - started, 0.61, pace, 10**8))
            if step == evaluated_at:
                on_progress(Progress(step, steps, step - started, 0.61, pace, 10**8, metrics=METRICS, is_best=True))
    return stderr.getvalue().splitlines()


def test_an_estimate_comes_first_and_then_each_tenth_and_each_evaluation() -> None:
    lines = said(1000, evaluated_at=104)
    assert lines[:3] == [
        "step 10 of 1000: training loss 0.61, 0.5 s a step, about 8:15 left",
        "step 100 of 1000: training loss 0.61, 7:30 left",
        "step 104 of 1000, validation: loss 0.5, macro f1 0.25 (best so far)",
    ]
    assert len(lines) == 11
    assert said(1000, pace=2.0)[0].endswith("about 33:00 left (--max-steps 300 would take ten minutes)")
    with training(quiet=True) as on_progress:
        assert on_progress is None


@pytest.mark.parametrize(("steps", "started", "first"), [(6, 0, 1), (60, 0, 6), (1000, 500, 510)])
def test_short_runs_and_resumed_ones_have_an_estimate_too(steps: int, started: int, first: int) -> None:
    assert said(steps, started)[0].startswith(f"step {first} of {steps}: training loss 0.61, 0.5 s a step")


class Slow:
    """Is freed while Ctrl-C comes, which Python then ignores."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_never_lost() -> None:
    def command() -> None:
        with one_line(debug=False):
            Slow()
            time.sleep(5)
            pytest.fail("the command went on")

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == INTERRUPTED


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a.csv, row 2:\n no text"), 2, "a.csv, row 2: no text"),
        (RuntimeError("it broke"), 1, "RuntimeError: it broke"),
        (OSError(28, "No space left on device", "out"), 1, "out: no space left; free some, or choose a folder"),
        (FileExistsError("out exists"), 1, "FileExistsError: out exists"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 2, "rich is missing; install dvora's extra 'cli'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_bad_input_is_wrong_use(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        with one_line(debug=False):
            raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    printed = capsys.readouterr()
    assert (ended.value.exit_code, printed.out, printed.err.count("\n")) == (code, "", 1)
    assert printed.err.startswith(f"Error: {line}")
