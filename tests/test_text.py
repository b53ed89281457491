"""Values and names as text."""

import pytest

from dvora.text import LONG, MANY, did_you_mean, nearest, shown, visible


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ("ünï 文 \U0001f600", "ünï 文 \U0001f600"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J\x7f", r"\x9b2J\x7f"),
        ("a\u202eb\u2066c\u200f", r"a\u202eb\u2066c\u200f"),
        ("a\u2028b\ufeff", r"a\u2028b\ufeff"),
        ("a\udc80", r"a\udc80"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_acts_is_spelled(text: str, expected: str) -> None:
    assert visible(text) == expected
    assert shown(text) == expected
    assert shown([text, {text: text}]) == f"{expected}, {expected} {expected}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (True, "yes"), (12345, "12,345"), (0.12345678, "0.1235"), (["a", 1.5], "a, 1.5")],
)
def test_values_are_text(value: object, text: str) -> None:
    assert shown(value) == text


def test_the_name_that_was_meant_is_offered_else_what_there_is() -> None:
    assert did_you_mean("Lable", ["text", "label"]) == "did you mean 'label'?"
    assert did_you_mean("xyz", ["text", "label"]) == "expected one of label, text"
    assert did_you_mean("xyz", []) == "there are none"
    assert nearest("labels", ["label", "lable", "text"], 2) == ["label", "lable"]


def test_long_and_many_names_are_not_compared() -> None:
    assert nearest("a" * (LONG + 1), ["a" * (LONG + 1)]) == []
    assert nearest("name", [*(f"m{number:05}" for number in range(MANY)), "name"]) == []
