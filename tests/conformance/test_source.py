"""PEFT's tests are those of the version that the tables were written for."""

from pathlib import Path

import pytest

from conformance import source
from materials.fetch import FetchError


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
