"""The wheel is tested with the README's first code, and a failure is one message."""

import pytest

from installation.environments import InstallationError
from installation.wheel import expect_advice, quick_start


def test_the_quick_start_is_the_readmes() -> None:
    assert "import dvora" in quick_start()
    assert "save_pretrained" in quick_start()


def test_advice_is_one_line_that_names_the_extra() -> None:
    expect_advice("Error: typer is missing; pip install '.[cli]'\n", "cli")
    for output in ("Error: typer is missing\n", "Traceback\nError: pip install '.[cli]'\n"):
        with pytest.raises(InstallationError, match=r"expected one line that says to install '\.\[cli\]'"):
            expect_advice(output, "cli")
