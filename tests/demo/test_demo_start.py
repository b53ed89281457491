"""How the demo starts, and what it leaves alone."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.__main__ import main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("cache", "out", "advice"), [("file/cache", "out", "DVORA_CACHE"), ("cache", "file/out", "--out")]
)
def test_a_folder_that_cannot_be_written_to_is_one_line(
    cache: str,
    out: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DVORA_CACHE", str(tmp_path / cache))
    # The demo sets these for its process.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit) as end:
        main()
    assert advice in str(end.value)
    assert "\n" not in str(end.value)
    assert capsys.readouterr().out.startswith("This takes about")


def test_a_package_that_is_missing_is_one_line() -> None:
    code = (
        "import sys, runpy; sys.modules['rich'] = None; sys.argv = ['demo']; runpy.run_module('demo', {}, '__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "make demo" in ended.stderr
    assert ended.stderr.count("\n") == 1
