"""The name that somebody probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

MANY, LONG = 1000, 60
"""Names that are compared, and letters of a name: comparing takes the product of their lengths."""
SHOWN = 20


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half sentence to append to an error: the nearest of the known names, else all of them, or the first ones."""
    names = sorted(known)
    compared = [each for each in islice(names, MANY) if len(each) <= LONG]
    if len(name) <= LONG and (near := get_close_matches(name.lower(), compared, n=1, cutoff=0.6)):
        return f"did you mean {near[0]!r}?"
    return f"expected one of {listed(names)}" if names else "there are none"


def listed(names: Iterable[str]) -> str:
    """Names with commas between them: as many as a reader wants to see."""
    shown = [*names]
    more = f" and {len(shown) - SHOWN:,} more" if len(shown) > SHOWN else ""
    return ", ".join(each if len(each) <= LONG else f"{each[:LONG]}..." for each in shown[:SHOWN]) + more
