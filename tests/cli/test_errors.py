"""How commands end."""

import signal
import time

import pytest
import typer

from dvora.cli.errors import INTERRUPTED, one_line


class Slow:
    """Is freed while Ctrl-C comes, which Python then ignores."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def command() -> None:
    with one_line(debug=False):
        Slow()
        time.sleep(5)
        pytest.fail("the command went on")


def test_ctrl_c_is_never_lost() -> None:
    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == INTERRUPTED
