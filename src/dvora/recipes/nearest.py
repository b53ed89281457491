"""The name that somebody probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A half sentence to append to an error: the nearest of the known names, else all of them."""
    names = sorted(known)
    if near := get_close_matches(name.lower(), names, n=1, cutoff=0.6):
        return f"did you mean {near[0]!r}?"
    return f"expected one of {', '.join(names)}" if names else "there are none"
