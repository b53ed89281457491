"""Ctrl-C, and two processes that want one folder."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from dvora.whole_files import new_folder
from tests.hardening.errors import assert_error
from tests.hardening.forks import Forks
from tests.hardening.test_kills import names

TRIES = 20

"""Moments with --fuzz."""

LONG = {
    "merge": "merge adapter -o out --json",
    "convert": "convert adapter --to dora -o out --json",
    "inspect": "inspect adapter --model base --json",
}


@pytest.mark.parametrize("command", LONG.values(), ids=LONG)
def test_ctrl_c_leaves_nothing_behind(forks: Forks, desk: Path, command: str, request: pytest.FixtureRequest) -> None:
    before, drawn, stopped = names(desk), random.Random(0), 0
    for _ in range(TRIES if request.config.getoption("--fuzz") else 3):
        ended = forks.run(desk, *command.split(), signal_after=drawn.uniform(0.03, 0.15), number=signal.SIGINT)
        assert ended.code in (0, 130), ended
        if ended.code == 0:
            shutil.rmtree(desk / "out", ignore_errors=True)
            continue
        stopped += 1
        assert ended.stdout == ""
        # Before the command has begun nothing is printed.
        assert ended.stderr in ("stopped\n", "")
        # The folder may have had its name already, or have been left between two instructions to the next attempt.
        for left in ("out", ".out.unfinished"):
            shutil.rmtree(desk / left, ignore_errors=True)
        assert names(desk) == before
    assert stopped


def test_two_commands_do_not_fill_one_folder(forks: Forks, desk: Path) -> None:
    command = ["convert", "adapter", "--to", "dora", "-o", "out"]
    with new_folder(desk / "out") as filled:
        (filled / "file").touch()
        assert_error(forks.run(desk, *command), 1, "another process is filling out; wait for it")
    assert names(desk / "out") == ["file"]
    assert_error(forks.run(desk, *command), 1, "out exists and is not an empty folder; choose another name")
