"""How a value is written in a table, on a page or a terminal."""

import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what is not seen but acts: escape sequences, marks that turn the reading direction ..."""
JOINERS = "\u200c\u200d"
"""Scripts of India and Persia are not written without them, nor many emojis."""


def visible(text: str) -> str:
    """A text from a file as a line that does nothing to a terminal or to the text around it: what acts is spelled."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) in HIDDEN and letter not in JOINERS else letter
        for letter in text
    )


def shown(value: Any) -> str:
    """A value as text: numbers to four digits, lists and mappings in a line; text made visible, HTML as it is."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(str(name))} {shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return value if isinstance(value, Markup) else visible(str(value))
