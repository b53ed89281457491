"""Commands on finished runs as they are typed: their output, their errors, their pipes."""

import csv
import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dvora.cli.app import app
from dvora.recipes.training.run import train
from tests.recipes import tiny_data, tiny_models
from tests.recipes.finished_runs import settings_of

ROOT = Path(__file__).parent.parent.parent
LINES = "good a movie\n\nbad the book\nawful it was\n"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: two finished runs, and files, under a name with a space and an umlaut."""
    folder = tmp_path_factory.mktemp("my dësk")
    for run, task, model, data in (
        ("dvora-run", "text-classification", tiny_models.bert(folder / "minilm"), tiny_data.reviews(folder / "a.csv")),
        ("runs/play", "causal-lm", tiny_models.llama(folder / "smollm2"), tiny_data.play(folder / "play.txt")),
    ):
        more = {"data": str(data), "output": str(folder / run), "epochs": 1, "rank": 4, "learning_rate": 0.03}
        train(settings_of(task, model, **more))
    (folder / "new.csv").write_text("id,text,verdict\n1,good it was fine,good\n2,poor book,bad\n")
    (folder / "lines.txt").write_text(LINES)
    (folder / "prompts.txt").write_text("the movie\nthe book\n")
    (folder / "folder.csv").mkdir()
    return folder


@pytest.fixture(autouse=True)
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


def typed(*arguments: str, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, [*arguments], input=stdin)


def test_evaluate_tells_the_record_s_figures_and_writes_them_where_asked(desk: Path) -> None:
    record = json.loads((desk / "dvora-run" / "run.json").read_text())["metrics"]
    shown = typed("evaluate", "dvora-run", "--json", "-o", "result.json")
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert json.loads((desk / "result.json").read_text()) == result
    trained, alone, guess = result["metrics"]
    assert alone == {"part": "test", "model": "head alone, base frozen", "loss": None, **record["test_head_alone"]}
    assert trained == {"part": "test", "model": "trained", **record["test"]}
    assert guess["model"] == f"always {record['test_simplest_guess']['guess']}"
    # On files the head alone is evaluated where that is asked for; on the same rows it gets the same metrics.
    files = json.loads(typed("evaluate", "dvora-run", "a.csv", "--base", "--json").stdout)["metrics"]
    assert [row["model"] for row in files] == ["trained", "head alone, base frozen", guess["model"]]
    table = typed("evaluate", "dvora-run", "a.csv").stdout
    assert "seen in training" in table
    assert "always" in table


def test_predict_writes_a_file_when_it_is_complete(desk: Path) -> None:
    result = typed("predict", "dvora-run", "new.csv", "-o", "predicted.csv", "--all-probabilities", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["output"], summary["rows"], sum(summary["predicted"].values())) == ("predicted.csv", 2, 2)
    with (desk / "predicted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert [*rows[0]] == ["id", "text", "verdict", "prediction", "probability", "probability_bad", "probability_good"]
    before = (desk / "predicted.csv").read_bytes()
    (desk / "broken.csv").write_text("text\n" + "good\n" * 100 + "good,bad\n")
    result = typed("predict", "dvora-run", "broken.csv", "-o", "predicted.csv")
    assert result.exit_code == 2
    assert "broken.csv, row 101: 2 cells" in result.stderr
    assert (desk / "predicted.csv").read_bytes() == before
    assert not [path for path in desk.iterdir() if path.name.startswith(".predicted")]


def test_predictions_of_lines_as_json() -> None:
    piped = [json.loads(line) for line in typed("predict", "dvora-run", stdin=LINES).stdout.splitlines()]
    assert [row["text"] for row in piped] == [line for line in LINES.splitlines() if line]
    assert json.loads(typed("predict", "dvora-run", "--json", stdin=LINES).stdout) == {"predictions": piped}
    assert json.loads(typed("predict", "dvora-run", "--json", stdin="").stdout) == {"predictions": []}


def test_texts_that_are_cut_are_reported(desk: Path) -> None:
    (desk / "long.csv").write_text("text,label\n" + "good " * 99 + ",good\nbad,bad\n")
    said = "1 of 2 texts (50.0%) are longer than 32 tokens and were cut"
    for arguments in (["predict", "dvora-run", "long.csv"], ["predict", "dvora-run", "long.csv", "-o", "cut.csv"]):
        assert said in typed(*arguments).stderr
    assert said in " ".join(typed("evaluate", "dvora-run", "long.csv").stdout.split())
    found = json.loads(typed("evaluate", "dvora-run", "long.csv", "--json").stdout)["truncation"]
    assert (found["texts"], found["cut"], found["tokens_lost"]) == (2, 1, 101 - 32)
    assert typed("predict", "dvora-run", "long.csv", "--quiet").stderr == ""


def test_continuations_as_json() -> None:
    arguments = ["generate", "runs/play", "--max-new-tokens", "5"]
    result = typed(*arguments, "--file", "prompts.txt")
    piped = [json.loads(line) for line in result.stdout.splitlines()]
    assert [[*row] for row in piped] == 2 * [["prompt", "with_adapter", "without_adapter"]]
    assert json.loads(typed(*arguments, "--json", stdin="the movie\n\nthe book").stdout) == {"continuations": piped}
    alone = json.loads(typed(*arguments, "the movie", "--only-adapter").stdout)
    assert alone == {"prompt": "the movie", "with_adapter": piped[0]["with_adapter"]}
    bare = typed("generate", "--adapter", "runs/play/adapter", "the movie", "--max-new-tokens", "5")
    assert json.loads(bare.stdout) == piped[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "minilm"], "holds no run.json"),
        (["evaluate", "dvora-run", "no.csv"], "no.csv: no such file"),
        (["evaluate", "dvora-run", "-o", "no/result.json"], "there is no folder no"),
        (["predict", "dvora-run", "no.csv"], "no.csv: no such file"),
        (["predict", "dvora-run", "new.csv", "-o", "predicted.xlsx"], "'.xlsx' names no format that is written"),
        (["predict", "dvora-run", "new.csv", "-o", "no/predicted.csv"], "there is no folder no"),
        (["predict", "dvora-run", "new.csv", "-o", "folder.csv"], "it is a folder; name a file in it"),
        (["predict", "dvora-run", "new.csv", "--text-column", "txt"], "did you mean 'text'"),
        (["evaluate", "runs/play", "--abstain-below", "0.7"], "abstain_below is for classes"),
        (["predict", "runs/play", "new.csv"], "`dvora generate` continues texts"),
        (["generate", "dvora-run", "x"], "use `dvora predict`"),
        (["generate"], "the folder of a run, or --adapter FOLDER"),
        (["generate", "runs/play", "x", "--adapter", "runs/play/adapter"], "both a run (runs/play) and --adapter"),
        (["generate", "runs/play", "x", "--model", "smollm2"], "a run knows its base"),
        (["generate", "runs/play", "x", "--file", "prompts.txt"], "both a prompt and --file"),
        (["generate", "runs/play", "x", "--top-p", "0.5"], "top_p is set but temperature is 0"),
        (["generate", "runs/play", "x", "--system", "y"], "give --chat too"),
        (["generate", "runs/play", ""], "the prompt is empty"),
        (["doctor", "nowhere"], "nowhere: no such file or folder"),
        (["doctor", "dvora-run", "--rows", "1"], "needs two or more"),
        (["doctor", "dvora-run", "--model", "minilm"], "leave --model out"),
        (["doctor", "runs/play/adapter", "new.csv"], "leave the data out"),
        (["report", "nowhere"], "nowhere: no such file or folder"),
        (["report", "minilm"], "holds no run.json"),
        (["report", "dvora-run", "-o", "page.txt"], "has to end in .html"),
        (["report", "dvora-run", "-o", "no/page.html"], "there is no folder no"),
        (["report", "dvora-run", "--against", "runs/play"], "predicts other classes"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = typed(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvora.cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", "COLUMNS": "70"}


def test_a_reader_that_has_enough_ends_it_quietly(desk: Path) -> None:
    running = subprocess.Popen(
        command("predict", "dvora-run"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert running.stdin
    assert running.stdout
    # Predictions come while the input goes on: a batch of them, and no end of the input.
    running.stdin.write(b"good a movie\n" * 32)
    running.stdin.flush()
    assert json.loads(running.stdout.readline())["text"] == "good a movie"
    running.stdout.close()
    # A batch or two that are written to nobody.
    _, errors = running.communicate(b"good a movie\n" * 5000, timeout=120)
    assert running.returncode == 1
    assert not {"Traceback", "BrokenPipeError", "Error:"} & {*errors.decode().split()}


def test_a_report_shows_no_line_of_another_package(desk: Path) -> None:
    # The doctor's other process imports them too, and writes to the same terminal.
    made = subprocess.run(command("report", "dvora-run"), capture_output=True, text=True, env=environment(), check=True)
    assert [line.partition(":")[0] for line in made.stderr.splitlines()] == ["Next"]


def on_a_terminal(*commands: str) -> str:
    """What commands show, one after the other, on a terminal of 70 columns."""
    ours, theirs = pty.openpty()
    calls = "; ".join(f"app({shlex.split(each)[1:]!r}, standalone_mode=False)" for each in commands)
    program = [sys.executable, "-c", f"from dvora.cli.app import app; {calls}"]
    running = subprocess.Popen(
        program, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE, env=environment()
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux reports that the other side is closed
        pass
    finally:
        os.close(ours)
    assert running.communicate()[1] is not None
    assert running.returncode == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_a_table(desk: Path) -> None:
    shown = on_a_terminal(
        "dvora predict dvora-run lines.txt",
        "dvora generate runs/play 'the movie' --max-new-tokens 3",
        "dvora generate runs/play 'the movie' --only-adapter --max-new-tokens 1",
    )
    head, *lines = shown.splitlines()[:4]
    assert head.split() == ["prediction", "probability", "text"]
    assert [line.split(maxsplit=2)[2] for line in lines] == [line for line in LINES.splitlines() if line]
    assert {line.split()[0] for line in lines} <= {"good", "bad"}
    assert "with the adapter" in shown
    assert "without" in shown
    assert "{" not in shown
