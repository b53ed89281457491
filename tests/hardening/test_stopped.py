"""Ctrl-C, readers that have gone, and two processes that want one folder."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from dvora.recipes.run_folder import locked
from dvora.whole_files import new_folder
from tests.hardening.errors import TRAIN, assert_error
from tests.hardening.forks import Forks
from tests.hardening.test_kills import contents, names

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


def test_ctrl_c_stops_training_at_any_moment_and_it_goes_on(
    forks: Forks, desk: Path, request: pytest.FixtureRequest
) -> None:
    whole = forks.run(desk, *TRAIN.split(), "-o", "whole", "--epochs", "2", "--quiet", "--json")
    drawn, stopped = random.Random(1), 0
    for number in range(TRIES if request.config.getoption("--fuzz") else 2):
        command = [*TRAIN.split(), "-o", f"out{number}", "--epochs", "2", "--quiet", "--json"]
        ended = forks.run(desk, *command, signal_after=drawn.uniform(0.05, whole.seconds), number=signal.SIGINT)
        assert ended.code in (0, 130), ended
        if ended.code:
            stopped += 1
            assert ended.stdout == ""
            on = f"; go on with: dvora train out{number}/config.yaml --resume\n"
            assert ended.stderr in ("", "stopped\n") or ended.stderr.endswith(on)
            assert ended.stderr.count("\n") <= 1
        ended = forks.run(desk, *command, "--resume")
        assert ended.code == 0, ended.stderr
        assert json.loads(ended.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]
        assert contents(desk / f"out{number}") == contents(desk / "whole")
    assert stopped


@pytest.mark.parametrize(
    "command",
    ["inspect adapter", "count base", "train --print-config", "--help"],
)
def test_a_reader_that_has_gone_is_no_reason_to_complain(forks: Forks, desk: Path, command: str) -> None:
    ended = forks.run(desk, *command.split(), unread=True)
    assert (ended.code, ended.stderr) == (1, "")


def test_two_runs_do_not_share_a_folder(forks: Forks, desk: Path) -> None:
    with locked(desk / "out"):
        for more in ([], ["--resume"], ["--json"]):
            assert_error(forks.run(desk, *TRAIN.split(), *more), 2, "another run works in", "choose another folder")
    assert forks.run(desk, *TRAIN.split()).code == 0


@pytest.mark.parametrize("command", ["merge adapter -o out", "convert adapter --to dora -o out"])
def test_two_commands_do_not_fill_one_folder(forks: Forks, desk: Path, command: str) -> None:
    with new_folder(desk / "out") as filled:
        (filled / "file").touch()
        for more in ([], ["--json"]):
            assert_error(forks.run(desk, *command.split(), *more), 1, "another process is filling out; wait for it")
    assert names(desk / "out") == ["file"]
    assert_error(forks.run(desk, *command.split()), 1, "out exists and is not an empty folder; choose another name")
