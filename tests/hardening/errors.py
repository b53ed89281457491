"""What every error is: an exit code, one line on stderr that says what to do, and nothing on stdout."""

from tests.hardening.forks import Ended

TRAIN = "train --task text-classification -m base --data reviews.csv -o out --rank 4 --cpu --epochs 1"


def assert_error(ended: Ended, code: int, *messages: str) -> None:
    assert ended.code == code, ended
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("Error: ")
    for message in messages:
        assert message in ended.stderr
