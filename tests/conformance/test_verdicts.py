"""Outcomes are compared with the table, both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTCOMES = """
import pytest

def test_passes(): pass

def test_fails(): assert False

def test_skips(): pytest.skip("of its own accord")
"""


def run(folder: Path, table: str, *options: str) -> tuple[int, str]:
    """Exit status and output of pytest on the three outcomes."""
    (folder / "test_outcomes.py").write_text(OUTCOMES)
    (folder / "expected.toml").write_text(table)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p conformance.verdicts -p no:cacheprovider\n")
    command = [sys.executable, "-m", "pytest", f"--expected={folder / 'expected.toml'}", *options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # Plugins that are installed are not needed, and take longer to load than all else.
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    outcome = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return outcome.returncode, outcome.stdout + outcome.stderr


def entry(kind: str, *tests: str, error: str = "AssertionError") -> str:
    names = json.dumps([f"test_outcomes.py::{test}" for test in tests])
    return f'[[{kind}]]\nreason = "Why it is {kind}."\nerror = "{error}"\ntests = {names}\n'


def test_what_is_listed_is_expected(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    table = entry("failing", "test_f*") + entry("skipped", "test_skips")
    status, output = run(tmp_path, table, f"--record={record}")
    assert status == 0, output
    assert "1 passed, 2 listed, 0 failed" in output
    counts = json.loads(record.read_text())
    assert (counts["passed"], counts["listed"], counts["failed"]) == (1, 2, 0)
    assert counts["reasons"] == {"Why it is failing.": 1, "Why it is skipped.": 1}
    assert counts["passed_by_file"] == {"test_outcomes.py": 1}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (entry("skipped", "test_skips"), "test_outcomes.py::test_fails"),
        (entry("failing", "test_fails"), "skipped without being listed"),
        (entry("failing", "test_fails", error="KeyError") + entry("skipped", "test_skips"), "and failed with: Assert"),
        (entry("failing", "test_fails", "test_passes") + entry("skipped", "test_skips"), "XPASS(strict)"),
        (entry("failing", "test_fails") + entry("skipped", "test_skips", "test_passes"), "and was not"),
        (entry("failing", "test_fails", "test_of_another_year"), "lists tests that do not exist"),
    ],
    ids=["failure", "skip", "other error", "listed failure passes", "listed skip passes", "unused pattern"],
)
def test_everything_else_fails_the_run(tmp_path: Path, table: str, message: str) -> None:
    status, output = run(tmp_path, table)
    assert status != 0
    assert message in output
