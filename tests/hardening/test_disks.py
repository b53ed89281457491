"""Disks that are full or read-only, files that are too large, and folders that this user may not write to or read."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hardening.errors import TRAIN, assert_error, assert_fails
from tests.hardening.forks import Forks

WRITES = {
    "merge": ["merge", "adapter", "--model", "base", "-o", "disk/out"],
    "convert to dora": ["convert", "adapter", "--model", "base", "--to", "dora", "-o", "disk/out"],
}

TRAIN_THERE = [*TRAIN.split(), "-o", "disk/out", "--epochs", "2", "--quiet", "--json"]

NOBODY = 65534


@pytest.fixture
def disk(desk: Path) -> Iterator[Callable[[str], None]]:
    """Mounts a small disk with these options as "disk" on the desk, or mounts it again with others."""
    place, mounted = desk / "disk", []
    place.mkdir()

    def mount(options: str) -> None:
        options = f"remount,{options}" if mounted else options
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root")
        mounted.append(options)

    yield mount
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("command", WRITES.values(), ids=WRITES)
def test_a_full_disk_is_reported_and_nothing_is_left_on_it(
    forks: Forks, desk: Path, disk: Callable[[str], None], command: list[str]
) -> None:
    disk("size=8k")
    assert_fails(forks, desk, command, 1, "no space left; free some, or choose a folder on another disk")
    assert not list((desk / "disk").iterdir())
    disk("size=4m")
    assert forks.run(desk, *command).code == 0


def test_a_run_goes_on_when_a_full_disk_has_space_again(forks: Forks, desk: Path, disk: Callable[[str], None]) -> None:
    whole = forks.run(desk, *TRAIN_THERE)
    assert whole.code == 0, whole.stderr
    shutil.rmtree(desk / "disk" / "out")
    # Room for the beginning of it.
    disk("size=76k")
    assert_error(forks.run(desk, *TRAIN_THERE), 1, "no space left")
    disk("size=4m")
    ended = forks.run(desk, *TRAIN_THERE, "--resume")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]


@pytest.mark.parametrize("command", [*WRITES.values(), [*TRAIN.split(), "-o", "disk/out"]], ids=[*WRITES, "train"])
def test_a_read_only_disk_is_reported(
    forks: Forks, desk: Path, disk: Callable[[str], None], command: list[str]
) -> None:
    disk("ro")
    assert_fails(forks, desk, command, 1, "disk/", "the disk is read-only; choose another folder")


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


# Root may do everything.
STRANGER = {"user": NOBODY} if os.getuid() == 0 else {}


@pytest.mark.parametrize(
    "command", [*([*command[:-1], "out"] for command in WRITES.values()), TRAIN.split()], ids=[*WRITES, "train"]
)
def test_a_folder_without_write_permission_is_reported(forks: Forks, strangers_desk: Path, command: list[str]) -> None:
    assert_fails(forks, strangers_desk, command, 1, "out", "permission denied", **STRANGER)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("reviews.csv", f"{TRAIN} -o out"),
        ("base/model.safetensors", "merge adapter --model base -o out"),
        ("adapter/adapter_model.safetensors", "merge adapter --model base -o out"),
    ],
)
def test_a_file_without_read_permission_is_reported(
    forks: Forks, strangers_desk: Path, file: str, command: str
) -> None:
    (strangers_desk / file).chmod(0)
    # Its runs and models go elsewhere.
    strangers_desk.chmod(0o777)
    assert_fails(forks, strangers_desk, command.split(), 1, file, "permission denied", **STRANGER)
