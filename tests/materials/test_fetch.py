"""Artefacts are fetched whole and verified, or not at all."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from materials.data import VADER, WORDNET
from materials.fetch import Artefact, FetchError, UnavailableError, build_once, cache_folder, fetch, unpack

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DVORA_CACHE", str(folder))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that apt-get downloads from."""
    if shutil.which("apt-get") is None:
        pytest.skip("apt-get is missing")
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def package(source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Artefact:
    """A package of Debian, and no other, with one file that is wanted and one that is not."""
    tree = source.parent / "tree"
    control = "Package: thing\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: nobody <nobody>\nDescription: thing\n"
    for name, text in {"DEBIAN/control": control, "usr/share/thing/wanted": "content", "usr/share/doc": ""}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text, encoding="ascii")
    # Of this folder dpkg-deb demands it.
    (tree / "DEBIAN").chmod(0o755)
    file = source / "thing_2.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(tree), str(file)], check=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = f"{control}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n"
    (source / "Packages").write_text(entry, encoding="ascii")
    (source / "sources.list").write_text(f"deb [trusted=yes] file:{source} ./\n", encoding="ascii")
    settings = f'Dir::Etc::SourceList "{source}/sources.list"; Dir::Etc::SourceParts "{source}/none";\n'
    (source / "apt.conf").write_text(settings, encoding="ascii")
    monkeypatch.setenv("APT_CONFIG", str(source / "apt.conf"))
    return Artefact("thing", "2.0-1", "deb", digest, megabytes=1, members="./usr/share/thing/*")


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


def test_a_package_of_debian_is_fetched_once(package: Artefact, source: Path, cache: Path) -> None:
    folder = fetch(package)
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {"usr/share/thing/wanted": "content"}
    assert [path.name for path in cache.iterdir()] == [f"thing-2.0-1-{package.sha256[:8]}"]
    shutil.rmtree(source)
    assert fetch(package) == folder


def test_another_package_of_debian_is_refused_unless_put_there_by_hand(
    package: Artefact, source: Path, cache: Path
) -> None:
    pinned = replace(package, sha256="0" * 64)
    with pytest.raises(UnavailableError, match=rf"thing_.*not the pinned file .*{package.sha256}") as caught:
        fetch(pinned)
    assert list(cache.iterdir()) == []
    unpacking = str(caught.value).split("`")[1].removeprefix("apt-get download thing && ")
    subprocess.run(["bash", "-c", unpacking], cwd=source, check=True)
    (source / pinned.folder_name).rename(cache / pinned.folder_name)
    assert (fetch(pinned) / "usr/share/thing/wanted").read_text() == "content"


def test_builds_of_other_releases_of_debian_are_taken(package: Artefact) -> None:
    pinned = replace(package, sha256="0" * 64, other_builds=(package.sha256,))
    assert (fetch(pinned) / "usr/share/thing/wanted").is_file()


def test_what_apt_get_cannot_fetch_leaves_nothing(package: Artefact, cache: Path) -> None:
    with pytest.raises(FetchError, match=r"could not fetch nothing=2\.0-1\. It said: .*Unable to locate package"):
        fetch(replace(package, package="nothing"))
    assert list(cache.iterdir()) == []


def test_without_apt_get_the_error_has_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    command = rf'apt-get download wordnet-base && dpkg-deb -x wordnet-base_\*.deb "{WORDNET.folder_name}"'
    with pytest.raises(UnavailableError, match=rf"apt-get is missing here.*`{command}`.*{cache}"):
        fetch(WORDNET)
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
