"""Tables on a terminal: names and numbers stay whole, sentences fold, columns are explained; notes go to stderr."""

import io
from contextlib import redirect_stderr, redirect_stdout

import pytest

from dvora.cli.output import Output, results_alone

NAME = "bert.encoder.layer.10.attention.output.dense"


def shown(columns: int, monkeypatch: pytest.MonkeyPatch, **more: object) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    stdout = io.StringIO()
    rows = [{"layer": NAME, "two words": 1.25, "remark": "a sentence of several words that is long enough to fold"}]
    with redirect_stdout(stdout):
        Output().result({"some_name": 3, "layers": rows}, "Title", **more)  # type: ignore[arg-type]
    return stdout.getvalue()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_names_are_whole_however_narrow_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(columns, monkeypatch)
    assert NAME in text
    assert "1.25" in text
    assert "two words" in text
    assert "some name" in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert (len([line for line in lines if line]) > 5) == (columns < 200)


def test_columns_are_explained_and_a_verdict_is_last(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(80, monkeypatch, legend={"angle": "how far rows turned"}, verdict="Verdict: fine")
    assert "how far rows turned" in text
    assert text.splitlines()[-1] == "Verdict: fine"


def test_the_next_command_can_be_copied() -> None:
    for output, expected in ((Output(), "Next: dvora report 'my run'  (a page)\n"), (Output(quiet=True), "")):
        stderr = io.StringIO()
        with redirect_stderr(stderr):
            output.next_step("dvora", "report", "my run", why="a page")
        assert stderr.getvalue() == expected
    stderr = io.StringIO()
    with redirect_stderr(stderr):
        Output(as_json=True).next_step("dvora", "report", "my run")
    assert stderr.getvalue() == ""


def test_what_libraries_print_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with results_alone():
        print("loading")
        Output(as_json=True).result({"a": 1})
    assert capsys.readouterr() == ('{"a": 1}\n', "loading\n")
