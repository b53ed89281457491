"""Values as text."""

import re

import pytest
from markupsafe import Markup

from dvora.tools.pages.pictures import axes_of, label, new_figure, svg
from dvora.tools.pages.text import shown, visible


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
    [(None, ""), (True, "yes"), (12345, "12,345"), (0.12345678, "0.1235"), (Markup("<b>\n"), "<b>\n")],
)
def test_values_are_text_and_html_is_left_as_it_is(value: object, text: str) -> None:
    assert shown(value) == text


def test_names_in_figures_are_no_formulas() -> None:
    figure = new_figure(3, 3)
    (axes,) = axes_of(figure)
    names = [r"$\frac$", "$3 to $5", r"a\$b", "_a", "\x1b[31m", "100 % $"]
    axes.plot([1, 2], [1, 100], label=label(names[0]))
    axes.set(yscale="log")
    axes.set_xticks(range(len(names)), [*map(label, names)])
    axes.legend()
    drawn = svg(figure, "names")
    for name in (r"$\frac$", "$3 to $5", r"a\$b", "_a", r"\x1b[31m", "100 % $"):
        assert f"{name}</text>" in drawn
    # Powers of ten still are formulas, of matplotlib's own.
    assert not re.search("<text[^>]*>[^<]*mathdefault", drawn)
