"""make's errors when an environment cannot be created."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("python", ["no-such-python", "/bin/false"])
def test_a_missing_python(python: str, tmp_path: Path) -> None:
    ended = made("demo", f"PYTHON={python}", f"VENV={tmp_path / 'environment'}")
    assert ended.returncode != 0
    assert f"PYTHON={python} is no Python 3.10 or newer" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = made("demo", f"VENV={tmp_path / 'file' / 'environment'}")
    assert ended.returncode != 0
    assert f"no environment could be made in VENV={tmp_path / 'file' / 'environment'}" in ended.stderr


def test_the_demo_uses_the_environment_of_the_tests(tmp_path: Path) -> None:
    for name in ("ready-dev", "ready-demo"):
        (tmp_path / name).touch()
    shown = made("--dry-run", "demo", f"VENV={tmp_path}")
    assert "pip install" not in shown.stdout
    (tmp_path / "ready-demo").unlink()
    assert "pip install" not in made("--dry-run", "demo", f"VENV={tmp_path}").stdout
    (tmp_path / "ready-dev").unlink()
    assert '".[demo]"' in made("--dry-run", "demo", f"VENV={tmp_path}").stdout
