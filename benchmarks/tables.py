"""The one writer of tables for the documentation, and how the numbers in their cells look."""

from collections.abc import Iterable, Sequence
from typing import Protocol


class Between(Protocol):
    """A value between two others, such as a mean and its interval, or a median and its quartiles."""

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown.

    Args:
        head: of the columns.
        rows: the cells of each, as many as there are columns.
    """
    return [_line(head).replace("|  |", "| |"), "|---" * len(head) + "|", *map(_line, rows)]


def text(*blocks: str | Iterable[str]) -> str:
    """Sentences and tables with an empty line between them, as they stand between the marks of a page."""
    return "\n\n".join(block if isinstance(block, str) else "\n".join(block) for block in blocks if block) + "\n"


def points(mean: float, within: Between, digits: int = 1) -> str:
    """A difference and its interval, such as `+1.2 (+0.9 to +1.5)`."""
    return f"{mean:+.{digits}f} ({within.low:+.{digits}f} to {within.high:+.{digits}f})"


def span(values: Iterable[int]) -> str:
    """A number, or the least and the most of several: `500`, or `1,094 to 1,216`."""
    ends = sorted({*values})
    return f"{ends[0]:,}" if len(ends) == 1 else f"{ends[0]:,} to {ends[-1]:,}"


def kilobytes(size: float | None) -> str:
    """A size without its unit; nothing where there is none."""
    return "" if size is None else f"{size / 1e3:,.0f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
