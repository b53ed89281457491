"""PEFT's own tests: translated, of the version that the tables were written for, and compared with these both ways."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from peft import LoraConfig, VeraConfig

from conformance import source
from conformance.counterparts import NoCounterpartError, counterpart, options
from dvora import DVoRAConfig
from materials.fetch import FetchError

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


# PEFT's tests are those of the version that the tables were written for.


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "version", lambda _: "0.0.1")
    with pytest.raises(FetchError, match=r"PEFT 0\.0\.1 is installed, and conformance knows 0\.21\.2"):
        source.copy_tests(tmp_path / "tests")
    assert not (tmp_path / "tests").exists()


def test_the_tests_are_laid_out_as_a_package(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    (folder / "left_over").mkdir(parents=True)
    source.copy_tests(folder)
    assert {"__init__.py", "testing_common.py", "test_custom_models.py"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "left_over").exists()


def test_those_of_another_version_come_from_an_archive(tmp_path: Path) -> None:
    written = tmp_path / "peft-99" / "tests" / "test_new.py"
    written.parent.mkdir(parents=True)
    written.touch()
    with tarfile.open(tmp_path / "peft.tar.gz", "w:gz") as archive:
        archive.add(written, "peft-99/tests/test_new.py")
    source.copy_tests(tmp_path / "laid", tmp_path / "peft.tar.gz")
    assert {path.name for path in (tmp_path / "laid").iterdir()} == {"__init__.py", "test_new.py"}


def test_of_another_version_listed_tests_may_be_gone(tmp_path: Path) -> None:
    table = entry("failing", "test_fails", "test_of_another_year") + entry("skipped", "test_skips")
    status, output = run(tmp_path, table, "--of-another-version")
    assert status == 0, output


# LoRA's and VeRA's cases, translated to DVoRA.


def test_options_are_renamed() -> None:
    of_lora = {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "init_lora_weights": False, "use_dora": True}
    assert options(of_lora) == {"r": 4, "alpha": 2, "dvora_dropout": 0.1, "init_weights": False}
    of_vera = {"projection_prng_key": 3, "d_initial": 0.2, "vera_dropout": 0.1, "bias": "vera_only"}
    assert options(of_vera) == {"projection_seed": 3, "d_initial": 0.2, "dvora_dropout": 0.1, "bias": "dvora_only"}


@pytest.mark.parametrize("of_lora", [{"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_options_of_lora_alone_have_no_counterpart(of_lora: dict[str, object]) -> None:
    with pytest.raises(NoCounterpartError):
        options(of_lora)


def test_an_option_that_nobody_has_read_about_stops_the_run() -> None:
    with pytest.raises(KeyError, match="an_option_of_tomorrow"):
        options({"an_option_of_tomorrow": 1})


def test_rows_of_cases() -> None:
    lora = ("MLP 1 LoRA", "MLP", LoraConfig, {"target_modules": ["lin0"], "lora_alpha": 4})
    assert counterpart(lora) == ("MLP 1 DVoRA", "MLP", DVoRAConfig, {"r": 8, "alpha": 4, "target_modules": ["lin0"]})
    assert counterpart(("Same", "vera", VeraConfig, {"r": 2})) == ("Same", "dvora", DVoRAConfig, {"r": 2})
    assert counterpart(LoraConfig) is DVoRAConfig
    config = counterpart(LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    assert (config.r, config.alpha, config.target_modules, config.init_weights) == (8, 8, {"lin0"}, False)
