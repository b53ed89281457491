"""What is in files is shown, and does nothing: no escape sequence, no markup, no formula, in a picture or a sheet."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dvora.cli.app import app
from dvora.cli.predict import _table
from dvora.recipes.data.examples import Input
from dvora.recipes.reports.prediction import Predicted
from tests.cli.program import run
from tests.recipes import tiny_models

LABELS = ["[/bold]", r"$\frac$", "\x1b]0;owned\x07\x1b[2J", "\u202egnp.exe", "_hidden", "costs $3 or $5", "a\tb \x9bc"]
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose classes have such names."""
    folder = tmp_path_factory.mktemp("display")
    tiny_models.bert(folder / "base")
    drawn = random.Random(0)
    texts = {" ".join(drawn.choices(tiny_models.WORDS, k=6)) for _ in range(100)}
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[text, LABELS[number % len(LABELS)]] for number, text in enumerate(sorted(texts))]
        csv.writer(file).writerows([["text", "label"], *rows])
    where = f"-m {folder}/base --data {folder}/a.csv -o {folder}/run"
    ended = run(f"dvora train --task text-classification {where} --rank 4 --epochs 1 --cpu")
    assert ended.code == 0, ended.stderr
    assert not ACTS.search(ended.stdout + ended.stderr)
    return folder


@pytest.fixture(autouse=True)
def at_the_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


@pytest.mark.parametrize("command", ["evaluate run", "predict run a.csv -o predicted.csv", "predict run a.csv"])
def test_labels_do_nothing_to_a_terminal(command: str) -> None:
    for more in ([], ["--json"]):
        ended = CliRunner().invoke(app, [*command.split(), *more])
        assert ended.exit_code == 0, ended.stderr
        assert not ACTS.search(ended.stdout + ended.stderr)


def test_labels_are_printed_as_they_are(desk: Path) -> None:
    found = json.loads(CliRunner().invoke(app, ["predict", "run", "a.csv", "--json"]).stdout)["predictions"]
    names = {label.strip() for label in LABELS}
    assert {row["label"].strip() for row in found} == names
    assert {row["prediction"] for row in found} <= names


def test_labels_are_read_on_the_page(desk: Path) -> None:
    ended = run("dvora report run --no-doctor -o page.html")
    assert ended.code == 0, ended.stderr
    page = (desk / "page.html").read_text(encoding="utf-8")
    assert not ACTS.search(page)
    drawn = page[page.index("Which classes it mistakes") : page.index("Compared with")]
    texts = re.findall(r'<th scope="row">([^<]*)</th>', drawn)
    for label in (
        "[/bold]",
        r"$\frac$",
        r"\x1b]0;owned\x07\x1b[2J",
        r"\u202egnp.exe",
        "_hidden",
        "costs $3 or $5",
    ):
        assert label in texts


def test_rows_for_a_terminal_are_lines() -> None:
    rows = [Predicted(Input({}, {"te\x1bxt": f"{label}\n{label}"}), {"prediction": label}) for label in LABELS]
    lines = [*_table(rows, tuple(LABELS), 300)]
    assert len(lines) == len(LABELS) + 1
    assert all(line.endswith("\n") and line.count("\n") == 1 and not ACTS.search(line[:-1]) for line in lines)


@pytest.mark.parametrize(
    "command",
    [
        "dvora evaluate 'no \x1b[31mrun'",
        "dvora inspect 'no \x1b[31mrun'",
        "dvora train --task '\x1b[31m'",
        "dvora train --targets a --learning-rates '\x1b[31m'",
        "dvora --\x1b[31m",
        "dvora evaluate run 'no\u202e.csv'",
    ],
)
def test_errors_do_nothing_to_a_terminal(command: str) -> None:
    for more in ("", " --debug"):
        ended = run(command + more)
        assert ended.code != 0
        assert not ACTS.search(ended.stderr)


def test_errors_are_short(desk: Path) -> None:
    (desk / "long.jsonl").write_text(json.dumps({"text": "a", "label": "x" * 10**6}) + "\n")
    ended = run("dvora evaluate run long.jsonl")
    assert ended.code == 2
    assert len(ended.stderr) < 2100
    assert ended.stderr.count("\n") == 1


def test_cells_that_would_be_formulas_are_text_when_that_is_asked_for(desk: Path) -> None:
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\n=1", "\uff1d1"]
    numbers = ["-5", "+4.5", "-1e-3", "5"]
    with (desk / "f.csv").open("w", newline="", encoding="utf-8") as file:
        cells_of = [[f"good {number}", cell] for number, cell in enumerate(formulas + numbers)]
        csv.writer(file).writerows([["text", "=id"], *cells_of])

    def cells(name: str) -> list[list[str]]:
        with (desk / name).open(newline="", encoding="utf-8") as file:
            return [[*row] for row in csv.reader(file, delimiter="\t" if name.endswith("tsv") else ",")]

    for name, option in (("safe.csv", " --safe-csv"), ("safe.tsv", " --safe-csv"), ("as-it-is.csv", "")):
        ended = run(f"dvora predict run f.csv -o {name} --all-probabilities{option}")
        assert ended.code == 0, ended.stderr
        mark = "'" if option else ""
        assert [row[1] for row in cells(name)] == [*(f"{mark}{cell}" for cell in ("=id", *formulas)), *numbers]
    for command in ("-o a.jsonl --safe-csv", "--safe-csv"):
        ended = run(f"dvora predict run f.csv {command}")
        assert (ended.code, ended.stdout) == (2, "")
        assert ".csv or .tsv" in ended.stderr or "csv or tsv" in ended.stderr
