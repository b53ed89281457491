"""Disks that are full or read-only, and files and folders that this user may not read or write to."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hardening.forks import TRAIN, Forks, assert_error

MERGE = "merge adapter --model base -o disk/out"
TRAIN_THERE = f"{TRAIN} -o disk/out --epochs 2 --quiet --json"
# Root may do everything.
STRANGER = {"user": 65534} if os.getuid() == 0 else {}


def assert_fails(forks: Forks, desk: Path, command: str, *messages: str, **options: Any) -> None:
    """The command fails as it should; nothing is left of it but a lock."""
    before = {*desk.rglob("*")}
    assert_error(forks.run(desk, *command.split(), **options), 1, *messages)
    assert {path.name for path in {*desk.rglob("*")} - before} <= {"out", ".lock"}


@pytest.fixture
def disk(desk: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a small disk with these options as "disk" on the desk, or mounts it again with others."""
    place, mounted = desk / "disk", []
    place.mkdir()

    def mount(options: str) -> None:
        options = f"remount,{options}" if mounted else options
        if shutil.which("mount") is None:
            pytest.skip("mount is not installed")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(options)

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_reported_and_nothing_is_left_on_it(
    forks: Forks, desk: Path, disk: Callable[[str], None]
) -> None:
    disk("size=8k")
    assert_fails(forks, desk, MERGE, "no space left; free some, or choose a folder on another disk")
    assert not list((desk / "disk").iterdir())
    disk("size=4m")
    assert forks.run(desk, *MERGE.split()).code == 0


def test_a_run_goes_on_when_a_full_disk_has_space_again(forks: Forks, desk: Path, disk: Callable[[str], None]) -> None:
    whole = forks.run(desk, *TRAIN_THERE.split())
    assert whole.code == 0, whole.stderr
    shutil.rmtree(desk / "disk" / "out")
    # Room for the beginning of it.
    disk("size=76k")
    assert_error(forks.run(desk, *TRAIN_THERE.split()), 1, "no space left")
    disk("size=4m")
    ended = forks.run(desk, *TRAIN_THERE.split(), "--resume")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]


def test_a_read_only_disk_is_reported(forks: Forks, desk: Path, disk: Callable[[str], None]) -> None:
    disk("ro")
    assert_fails(forks, desk, MERGE, "disk/", "the disk is read-only; choose another folder")


@pytest.fixture
def strangers_desk(made: Path) -> Iterator[Path]:
    """A desk that everybody may read, and nobody but its owner write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        desk = Path(shutil.copytree(made, Path(folder) / "desk"))
        for path in (desk, *desk.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        yield desk
        desk.chmod(0o755)


@pytest.mark.parametrize(
    ("named", "command"),
    [
        ("out", TRAIN),
        ("reviews.csv", TRAIN),
        ("adapter/adapter_model.safetensors", "merge adapter --model base -o out"),
    ],
)
def test_what_this_user_may_not_read_or_write_to_is_reported(
    forks: Forks, strangers_desk: Path, named: str, command: str
) -> None:
    if named != "out":
        (strangers_desk / named).chmod(0)
        # Its runs and models could be written.
        strangers_desk.chmod(0o777)
    assert_fails(forks, strangers_desk, command, named, "permission denied", **STRANGER)
