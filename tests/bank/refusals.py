"""How tests of refusals say what is refused, and the batch that is served before and after."""

from typing import Any

import pytest

NAMES = ["a", None, "b", "a"]


def refused(error: type[Exception], message: str) -> Any:
    """One line that says what is wrong."""
    return pytest.raises(error, match=message)
