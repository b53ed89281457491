"""The runner: rows, the file of results, the exit status; the catalogue; the table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.examples import rows
from benchmarks.examples.__main__ import run_all
from benchmarks.examples.catalogue import CATALOGUE, Example

FOLDER = Path(__file__).parent.parent.parent / "examples"
# What several of them use.
SHARED = {
    *("__init__", "checks", "eight_bits", "flower_strategies", "lying_digits", "messages", "reviews"),
    *("serving", "spoken_lines", "sync_costs", "top_layers"),
}

REPORTS = """print('{"works": true, "figures": {"loss": [2.0, 1.0]}}')\n"""
"""As `examples.checks.report` prints it, which imports torch."""
FAILS = 'raise SystemExit("the loss went up")\n'
SAYS_NOTHING = 'print("trained")\n'


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for examples that report as the real ones do."""
    (tmp_path / "examples").mkdir()
    for name in ("__init__", "checks"):
        (tmp_path / "examples" / f"{name}.py").symlink_to(FOLDER / f"{name}.py")
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    return tmp_path


def made(root: Path, name: str, code: str, **options: object) -> Example:
    (root / "examples" / f"{name}.py").write_text(code, encoding="utf-8")
    return Example(name, trainer="torch", shows="a loss", **options)


def saved_rows(file: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}


def test_the_catalogue_names_every_file_once() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - SHARED
    assert sorted(example.name for example in CATALOGUE) == sorted(files)


@pytest.mark.parametrize("example", CATALOGUE, ids=lambda example: example.name)
def test_an_example_says_what_it_is_and_reports_last(example: Example) -> None:
    text = (FOLDER / f"{example.name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert "report(" in text
    # Nothing that a reader who copies it would not want.
    assert not re.search(r"^\s*(from|import) (benchmarks|demo|tests)\b", text, flags=re.MULTILINE)
    assert len(text.splitlines()) <= 150
    # Six simulations, and sixteen runs.
    assert example.limit_seconds <= (600 if example.name in ("federated_flower", "sixteen_classifiers") else 300)


def test_one_that_works_has_its_figures_and_versions(root: Path) -> None:
    code = 'from examples.checks import report\nreport({"works": True, "figures": {"loss": [2.0, 1.0]}})\n'
    example = made(root, "good", code, needs=("torch",))
    row = rows.row_of(example)
    assert row["outcome"] == "works"
    assert row["figures"] == {"loss": [2.0, 1.0]}
    assert set(row["versions"]) == {"torch"}
    assert row["seconds"] < example.limit_seconds


@pytest.mark.parametrize(
    ("code", "limit", "reason"),
    [
        (FAILS, 60, "exit status 1\nthe loss went up"),
        (SAYS_NOTHING, 60, "no report\ntrained"),
        (REPORTS + FAILS, 60, "exit status 1\nthe loss went up"),
        ("import time\ntime.sleep(600)\n", 1, "still running after 1 s, and killed"),
    ],
    ids=["a claim that does not hold", "no report", "an error after the report", "never ends"],
)
def test_one_that_fails_says_why_and_fails_the_run(root: Path, code: str, limit: float, reason: str) -> None:
    bad, good = made(root, "bad", code, limit_seconds=limit), made(root, "good", REPORTS)
    assert run_all([bad, good], [bad, good], root / "examples.json") == 1
    found = saved_rows(root / "examples.json")
    assert (found["bad"]["outcome"], found["bad"]["reason"]) == ("failed", reason)
    assert found["good"]["outcome"] == "works"


def test_without_its_packages_an_example_is_not_started(root: Path) -> None:
    example = made(root, "absent", FAILS, needs=("torch", "no-such-package"))
    file = root / "examples.json"
    assert run_all([example], [example], file) == 0
    row = saved_rows(file)["absent"]
    assert (row["outcome"], row["reason"]) == ("not installed", "install no-such-package")


def test_a_run_of_some_keeps_the_rows_of_the_others(root: Path) -> None:
    first, second, gone = made(root, "first", REPORTS), made(root, "second", FAILS), made(root, "gone", REPORTS)
    file = root / "examples.json"
    run_all([gone, second, first], [first, second, gone], file)
    before = saved_rows(file)
    made(root, "second", REPORTS)
    assert run_all([second], [first, second], file) == 0
    after = saved_rows(file)
    assert list(after) == ["first", "second"]
    assert after["first"] == before["first"]
    assert after["second"]["outcome"] == "works"
