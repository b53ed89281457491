"""How the demo starts, and what it leaves alone."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.__main__ import main, parse

ROOT = Path(__file__).parents[2]


def start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_cache_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = start("-m", "demo", "--out", str(tmp_path / "out"), DVORA_CACHE=str(tmp_path / "file" / "cache"))
    assert ended.returncode == 1
    assert ended.stdout.startswith("This takes about")
    assert ended.stderr.count("\n") == 1
    assert "DVORA_CACHE" in ended.stderr


def test_a_package_that_is_missing_is_one_line() -> None:
    code = (
        "import sys, runpy; sys.modules['rich'] = None; sys.argv = ['demo']; runpy.run_module('demo', {}, '__main__')"
    )
    ended = start("-c", code)
    assert ended.returncode == 1
    assert "make demo" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    # The demo sets both for its process.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit, match=r"^[^\n]+--out$"):
        main()


def test_a_recorded_run_is_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--quick", "--record"])
    with pytest.raises(SystemExit):
        parse()
