"""Artefacts are fetched whole and verified, or not at all."""

import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from materials.data import VADER
from materials.fetch import FetchError, build_once, cache_folder, fetch, unpack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DVORA_CACHE", str(folder))
    return folder


def test_cache_folder_follows_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("DVORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/dvora")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "dvora"


def test_a_real_source_archive_is_fetched_once(cache: Path) -> None:
    folder = fetch(VADER)
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [VADER.members]
    assert [path.name for path in cache.iterdir()] == [folder.name]
    stamp = (folder / VADER.members).stat().st_mtime_ns
    assert fetch(VADER) == folder
    assert (folder / VADER.members).stat().st_mtime_ns == stamp


def test_another_file_than_the_pinned_one_is_refused(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"vadersentiment==3\.3\.2.*not the pinned file"):
        fetch(replace(VADER, sha256="0" * 64))
    assert list(cache.iterdir()) == []


def test_a_killed_build_is_retried(cache: Path) -> None:
    program = """
import os
from materials.fetch import build_once

def killed(folder):
    (folder / "half").write_text("half")
    os._exit(9)

build_once("thing", killed)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 9
    assert not (cache / "thing").exists()
    folder = build_once("thing", lambda empty: (empty / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_two_processes_build_the_same_folder(cache: Path) -> None:
    # Each waits inside its build until the other is inside too, so that both come to the rename.
    program = """
import sys, time
from pathlib import Path
from materials.fetch import build_once

me, other = (Path(name) for name in sys.argv[1:])

def build(folder):
    (folder / "whole").touch()
    me.touch()
    while not other.exists():
        time.sleep(0.01)

print(build_once("thing", build).name)
"""
    marks = [str(cache.parent / name) for name in ("one", "two")]
    processes = [
        subprocess.Popen([sys.executable, "-c", program, *order], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for order in (marks, marks[::-1])
    ]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers == ["thing", "thing"]
    assert [path.name for path in cache.iterdir()] == ["thing"]


@pytest.mark.parametrize(
    "name", ["wanted/../../outside", "/wanted/absolute", "wanted\\..\\outside", "wanted/c:outside"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    archive = tmp_path / f"evil.{kind}"
    if kind == "tar":
        with tarfile.open(archive, "w") as tarred:
            tarred.addfile(tarfile.TarInfo(name), io.BytesIO())
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr(name, "")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(FetchError, match="points outside the archive"):
        unpack(archive, "*wanted*", target)
    assert list(target.iterdir()) == []
