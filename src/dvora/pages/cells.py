"""How a value is written in a table, on a page or a terminal."""

from collections.abc import Mapping
from typing import Any


def shown(value: Any) -> str:
    """A value as text: numbers to four digits, lists and mappings in a line; text, marked up or not, as it is."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else str(value)
