"""SIGKILL while something is written: what is left is whole, can be gone on with, or is not there."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.bank.adapters import contents as adapters_in
from tests.bank.adapters import many
from tests.hardening.forks import Forks

QUICK, FULL, SEED = 2, 20, 20261126

"""Kills of each command in the normal suite, and with --fuzz; the seed of their moments."""

TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu --dropout 0.1"

COMMANDS = {
    "train": f"{TRAIN} --epochs 2 --quiet --json",
    "merge into shards": "merge adapter -o out --shard-size 8KB --json",
    "convert to dora": "convert adapter --to dora -o out --json",
}


class Whole(NamedTuple):
    """What a command leaves when nobody kills it."""

    desk: Path
    names: list[str]
    result: dict[str, object]
    seconds: float
    changes: int


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    """The files whose content is the same in every run: README files and the records have paths and times in them."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="session", params=COMMANDS)
def whole(
    request: pytest.FixtureRequest, made: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Whole]:
    desk = Path(shutil.copytree(made, tmp_path_factory.mktemp("whole") / "desk"))
    ended = forks.run(desk, *COMMANDS[request.param].split())
    assert ended.code == 0, ended.stderr
    assert ended.changes > 3
    assert contents(desk / "out")
    result = json.loads(ended.stdout)
    return request.param, Whole(desk, names(desk), result, ended.seconds, ended.changes)


def moments(name: str, expected: Whole, count: int) -> list[dict[str, float]]:
    """When to kill: at any time, and, as little of it is spent writing, when the process is about to change a file."""
    drawn = random.Random(f"{SEED} {name}")
    return [
        {"kill_at": drawn.randint(1, expected.changes)}
        if number % 2 == 0
        else {"signal_after": drawn.uniform(0, expected.seconds)}
        for number in range(count)
    ]


def test_a_killed_command_leaves_all_or_nothing_and_goes_on(
    whole: tuple[str, Whole], forks: Forks, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name, expected = whole
    arguments = COMMANDS[name].split()
    kills = 0
    for number, moment in enumerate(moments(name, expected, FULL if request.config.getoption("--fuzz") else QUICK)):
        desk = Path(shutil.copytree(made, tmp_path / f"{number}"))
        ended = forks.run(desk, *arguments, **moment)
        assert ended.code in (0, -signal.SIGKILL), (moment, ended)
        kills += ended.code != 0
        if arguments[0] == "train":
            check_run(forks, desk, expected, arguments, moment)
        else:
            check_folder(forks, desk, expected, arguments, moment)
        shutil.rmtree(desk)
    assert kills >= (FULL * 2 // 3 if request.config.getoption("--fuzz") else 1)


def check_run(forks: Forks, desk: Path, expected: Whole, arguments: list[str], moment: dict[str, float]) -> None:
    """Whatever has its name is whole; killed once more while it goes on, and left alone then, the run ends the same."""
    assert_whole(desk / "out" / "adapter", expected.desk / "out" / "adapter", moment)
    forks.run(desk, *arguments, "--resume", **moment)
    assert_whole(desk / "out" / "adapter", expected.desk / "out" / "adapter", moment)
    ended = forks.run(desk, *arguments, "--resume")
    assert ended.code == 0, (moment, ended.stderr)
    result = json.loads(ended.stdout)
    for key in ("metrics", "best_step", "steps", "rows", "trained_parameters"):
        assert result[key] == expected.result[key], (moment, key)
    assert contents(desk / "out") == contents(expected.desk / "out"), moment
    assert names(desk) == expected.names, moment
    records = [json.loads((folder / "out" / "run.json").read_text()) for folder in (desk, expected.desk)]
    assert records[0]["history"] == records[1]["history"], moment


def check_folder(forks: Forks, desk: Path, expected: Whole, arguments: list[str], moment: dict[str, float]) -> None:
    """The folder is whole or not there, and the same command makes it then."""
    assert_whole(desk / "out", expected.desk / "out", moment)
    ended = forks.run(desk, *arguments)
    if (desk / "out").exists() and ended.code:
        assert "is not an empty folder" in ended.stderr, moment
    else:
        assert ended.code == 0, (moment, ended.stderr)
    assert contents(desk / "out") == contents(expected.desk / "out"), moment
    assert names(desk) == expected.names, moment


def assert_whole(folder: Path, expected: Path, moment: dict[str, float]) -> None:
    """A folder has everything that it is to have, or it does not exist."""
    if folder.exists():
        assert names(folder) == names(expected), moment
        assert contents(folder) == contents(expected), moment


def test_an_adapter_saved_over_another_is_the_old_one_the_new_one_or_refused(
    forks: Forks, made: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """PEFT's own `save_pretrained` writes in place."""
    count = FULL if request.config.getoption("--fuzz") else QUICK
    ended = forks.run(made, "save", str(tmp_path / "new"), "base")
    assert ended.code == 0, ended.stderr
    new, drawn = contents(tmp_path / "new"), random.Random(SEED)
    old = {"adapter_model.safetensors": (made / "adapter" / "adapter_model.safetensors").read_bytes()}
    for number in range(count):
        folder = Path(shutil.copytree(made / "adapter", tmp_path / f"{number}"))
        forks.run(tmp_path, "save", str(folder), str(made / "base"), signal_after=drawn.uniform(0, ended.seconds))
        inspected = forks.run(made, "inspect", str(folder), "--model", "base", "--json")
        if inspected.code == 0:
            assert contents(folder) in (old, new)
        else:
            assert (inspected.code, inspected.stdout) == (1, "")
            assert "Traceback" not in inspected.stderr


PACK = ["bank", "pack", "adapters", "--quiet", "--output"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk with so many adapters that packing them takes a while."""
    folder = tmp_path_factory.mktemp("packed")
    many(folder / "adapters", 100)
    return folder


def moments_of_names(changes: int, seconds: float, count: int) -> list[dict[str, float]]:
    """When the process is about to change one of the first or of the last names, and at any time."""
    drawn = random.Random(SEED)
    return [
        *({"kill_at": number} for number in sorted({1, 2, 3, changes - 2, changes - 1, changes})),
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
    new, seen, count = (desk / "out").read_bytes(), set(), FULL if request.config.getoption("--fuzz") else QUICK
    for moment in moments_of_names(ended.changes, ended.seconds, count):
        (desk / "out").write_bytes(b"old")
        forks.run(desk, *command, **moment)
        seen.add((desk / "out").read_bytes())
        assert seen <= {b"old", new}, moment
        again = forks.run(desk, *command)
        assert again.code == 0, (moment, again.stderr)
        assert (desk / "out").read_bytes() == new
        assert names(desk) == [*names(adapters), "out"], moment
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
    expected, every = adapters_in(desk / "adapters"), names(desk)
    for moment in moments_of_names(ended.changes, ended.seconds, FULL if request.config.getoption("--fuzz") else QUICK):
        shutil.rmtree(desk / "out", ignore_errors=True)
        forks.run(desk, *command, **moment)
        assert not (desk / "out").exists() or adapters_in(desk / "out") == expected, moment
        shutil.rmtree(desk / "out", ignore_errors=True)
        assert forks.run(desk, *command).code == 0, moment
        assert adapters_in(desk / "out") == expected
        assert names(desk) == every, moment
