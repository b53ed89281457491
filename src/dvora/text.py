"""How values and names are written for people: in tables, on pages, on terminals and in messages."""

import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of what is not seen but acts: escape sequences, marks that turn the reading direction ..."""
JOINERS = "\u200c\u200d"
"""Scripts of India and Persia are not written without them, nor many emojis."""

MANY, LONG = 1000, 60
"""Names that are compared, and letters of a name: comparing takes the product of their lengths."""
SHOWN = 20


def visible(text: str) -> str:
    """A text from a file as a line that does nothing to a terminal or to the text around it: what acts is spelled."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(letter)[1:-1] if unicodedata.category(letter) in HIDDEN and letter not in JOINERS else letter
        for letter in text
    )


def shown(value: Any) -> str:
    """A value as text: numbers to four digits, lists and mappings in a line; text made visible."""
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
    return visible(str(value))


def nearest(name: str, names: Iterable[str], most: int = 1) -> list[str]:
    """The names that are most like a given one, the likeliest first; none where none is."""
    compared = [other for other in islice(sorted(names), MANY) if len(other) <= LONG]
    return get_close_matches(name.lower(), compared, n=most, cutoff=0.6) if len(name) <= LONG else []


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A half sentence to append to an error: the nearest of the names that there are, else the first of them."""
    names = sorted(names)
    if near := nearest(name, names):
        return f"did you mean {near[0]!r}?"
    return f"expected one of {listed(names)}" if names else "there are none"


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """Names with commas between them: as many as a reader wants to see."""
    names = [*names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= LONG else f"{name[:LONG]}..." for name in names[:most]) + more
