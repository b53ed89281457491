"""Ctrl-C, and two processes that want one folder."""

import shutil
import signal
from pathlib import Path

import pytest

from dvora.whole_files import new_folder
from tests.hardening.errors import assert_error
from tests.hardening.forks import Forks
from tests.hardening.test_kills import names


def test_ctrl_c_leaves_nothing_behind(forks: Forks, desk: Path, request: pytest.FixtureRequest) -> None:
    command, before = "merge adapter -o out --json", names(desk)
    changes = forks.run(desk, *command.split()).changes
    shutil.rmtree(desk / "out")
    every = range(1, changes + 1)
    for change in every if request.config.getoption("--fuzz") else (1, changes // 2, changes):
        ended = forks.run(desk, *command.split(), kill_at=change, signal=signal.SIGINT)
        assert (ended.code, ended.stdout, ended.stderr) == (130, "", "stopped\n"), (change, ended)
        assert names(desk) == before, change


def test_two_commands_do_not_fill_one_folder(forks: Forks, desk: Path) -> None:
    command = ["convert", "adapter", "--to", "dora", "-o", "out"]
    with new_folder(desk / "out") as filled:
        (filled / "file").touch()
        assert_error(forks.run(desk, *command), 1, "another process is filling out; wait for it")
    assert names(desk / "out") == ["file"]
    assert_error(forks.run(desk, *command), 1, "out exists and is not an empty folder; choose another name")
