"""SIGKILL while a pack is written or unpacked: what was there before, or the whole new one, and no rest of it."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.bank.adapters import contents, many
from tests.hardening.forks import Forks

QUICK, FULL, SEED = 4, 60, 20261127
"""Kills of each command at any time in the normal suite, and with --fuzz; the seed of their moments."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    many(folder / "adapters", 300)
    return folder


def moments(name: str, count: int, changes: int, seconds: float) -> list[dict[str, float]]:
    """When the process is about to change one of the first or the last names, and at any time."""
    drawn = random.Random(f"{SEED} {name}")
    names = sorted({*range(1, 4), *range(changes - 2, changes + 1)})
    return [
        *({"kill_at": number} for number in names),
        *({"signal_after": drawn.uniform(0, seconds)} for _ in range(count)),
    ]


def test_a_killed_pack_is_the_old_one_or_the_new_one(
    adapters: Path, forks: Forks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    desk, command = (
        Path(shutil.copytree(adapters, tmp_path / "desk")),
        ["bank", "pack", "adapters", "-o", "out", "--quiet"],
    )
    ended = forks.run(desk, *command)
    assert ended.code == 0, ended.stderr
    new, kills, seen = (desk / "out").read_bytes(), 0, set()
    count = FULL if request.config.getoption("--fuzz") else QUICK
    for moment in moments("pack", count, ended.changes, ended.seconds):
        (desk / "out").write_bytes(b"old")
        killed = forks.run(desk, *command, **moment)
        kills += killed.code == -signal.SIGKILL
        seen.add((desk / "out").read_bytes())
        assert seen <= {b"old", new}, moment
        again = forks.run(desk, *command)
        assert again.code == 0, (moment, again.stderr)
        assert (desk / "out").read_bytes() == new
        assert sorted(path.name for path in desk.iterdir()) == ["adapters", "out"], moment
    assert kills >= 6
    # Killed after it took its name, too.
    assert seen == {b"old", new}


def test_what_a_killed_command_unpacked_is_whole_or_not_there(
    adapters: Path, forks: Forks, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    desk, command = (
        Path(shutil.copytree(adapters, tmp_path / "desk")),
        ["bank", "unpack", "pack", "-o", "out", "--quiet"],
    )
    assert forks.run(desk, *["bank", "pack", "adapters", "-o", "pack", "--quiet"]).code == 0
    ended = forks.run(desk, *command)
    assert ended.code == 0, ended.stderr
    whole = contents(desk / "adapters")
    count = FULL if request.config.getoption("--fuzz") else QUICK
    for moment in moments("unpack", count, ended.changes, ended.seconds):
        shutil.rmtree(desk / "out", ignore_errors=True)
        forks.run(desk, *command, **moment)
        assert not (desk / "out").exists() or contents(desk / "out") == whole, moment
        shutil.rmtree(desk / "out", ignore_errors=True)
        assert forks.run(desk, *command).code == 0, moment
        assert contents(desk / "out") == whole
        assert sorted(path.name for path in desk.iterdir()) == ["adapters", "out", "pack"], moment
