"""SIGKILL or Ctrl-C while something is written: what is left is whole, can be gone on with, or is not there."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from dvora.whole_files import new_folder
from tests.bank.tenants import many
from tests.hardening.forks import Forks, assert_error

FULL, SEED = 20, 20261126
"""Kills of each command of either kind with --fuzz, of three in all without; the seed of their moments."""
TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu --dropout 0.1"
COMMANDS = {
    "train": f"{TRAIN} --epochs 2 --quiet --json",
    "merge into shards": "merge adapter -o out --shard-size 8KB --json",
    "pack": "bank pack adapters -o out --json",
    "unpack": "bank unpack pack -o out --json",
}


class Whole(NamedTuple):
    """What a command leaves when nobody kills it."""

    start: Path
    desk: Path
    result: dict[str, object]
    moments: list[dict[str, float]]
    """When to kill: at any time, and, as little of it is spent writing, when the process is about to change a file."""


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def contents(path: Path) -> dict[str, bytes]:
    """What is the same in every run: README files and the records have paths and times in them."""
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def start(made: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("start") / "desk"))
    many(desk / "adapters", 50)
    assert forks.run(desk, *["bank", "pack", "adapters", "-o", "pack", "--quiet"]).code == 0
    return desk


@pytest.fixture(params=COMMANDS)
def whole(
    request: pytest.FixtureRequest, start: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Whole]:
    desk = Path(shutil.copytree(start, tmp_path_factory.mktemp("whole") / "desk"))
    ended = forks.run(desk, *COMMANDS[request.param].split())
    assert ended.code == 0, ended.stderr
    assert contents(desk / "out")
    drawn = random.Random(f"{SEED} {request.param}")
    moments = [
        # About to give the last name.
        {"kill_at": ended.changes},
        *({"kill_at": drawn.randint(1, ended.changes)} for _ in range(FULL)),
        *({"signal_after": drawn.uniform(0, ended.seconds)} for _ in range(FULL)),
    ]
    chosen = moments if request.config.getoption("--fuzz") else [moments[0], moments[1], moments[-1]]
    return COMMANDS[request.param], Whole(start, desk, json.loads(ended.stdout), chosen)


def test_a_killed_command_leaves_all_or_nothing_and_goes_on(
    whole: tuple[str, Whole], forks: Forks, tmp_path: Path
) -> None:
    command, expected = whole
    kills = 0
    for number, moment in enumerate(expected.moments):
        desk = Path(shutil.copytree(expected.start, tmp_path / f"{number}"))
        ended = forks.run(desk, *command.split(), **moment)
        assert ended.code in (0, -signal.SIGKILL), (moment, ended)
        kills += ended.code != 0
        if command.startswith("train"):
            check_run(forks, desk, expected, command, moment)
        else:
            check_output(forks, desk, expected, command, moment)
        assert contents(desk / "out") == contents(expected.desk / "out"), moment
        assert names(desk) == names(expected.desk), moment
        shutil.rmtree(desk)
    assert kills >= len(expected.moments) // 3


def check_run(forks: Forks, desk: Path, expected: Whole, command: str, moment: dict[str, float]) -> None:
    """Whatever has its name is whole; killed once more while it goes on, and left alone then, the run ends the same."""
    assert_whole(desk / "out" / "adapter", expected.desk / "out" / "adapter", moment)
    forks.run(desk, *command.split(), "--resume", **moment)
    assert_whole(desk / "out" / "adapter", expected.desk / "out" / "adapter", moment)
    ended = forks.run(desk, *command.split(), "--resume")
    assert ended.code == 0, (moment, ended.stderr)
    result = json.loads(ended.stdout)
    for key in ("metrics", "best_step", "steps", "rows", "trained_parameters"):
        assert result[key] == expected.result[key], (moment, key)
    records = [json.loads((folder / "out" / "run.json").read_text()) for folder in (desk, expected.desk)]
    assert records[0]["history"] == records[1]["history"], moment


def check_output(forks: Forks, desk: Path, expected: Whole, command: str, moment: dict[str, float]) -> None:
    """A file or a folder is whole or not there, and the same command makes it then."""
    assert_whole(desk / "out", expected.desk / "out", moment)
    ended = forks.run(desk, *command.split())
    assert ended.code == 0 or "is not an empty folder" in ended.stderr, (moment, ended.stderr)


def assert_whole(path: Path, expected: Path, moment: dict[str, float]) -> None:
    """It has everything that it is to have, or it does not exist."""
    if path.exists():
        assert names(path) == names(expected), moment
        assert contents(path) == contents(expected), moment


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
