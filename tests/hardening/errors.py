"""What every error is: an exit code, one line on stderr that says what to do, and nothing on stdout."""

from pathlib import Path
from typing import Any

from tests.hardening.forks import Ended, Forks

TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu --epochs 1"


def assert_error(ended: Ended, code: int, *messages: str) -> None:
    assert ended.code == code, ended
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("Error: ")
    for message in messages:
        assert message in ended.stderr


def assert_fails(forks: Forks, desk: Path, command: list[str], code: int, *messages: str, **options: Any) -> None:
    """The command fails as it should, and with --json too."""
    before = sorted(desk.iterdir())
    for more in ([], ["--json"]):
        assert_error(forks.run(desk, *command, *more, **options), code, *messages)
    # A run that could not start leaves its folder with the lock, and nothing else.
    assert [path for path in sorted(desk.iterdir()) if path.name != "out"] == before
    if (desk / "out").exists() and desk / "out" not in before:
        assert [path.name for path in (desk / "out").iterdir()] == [".lock"]
