"""A page of sections with text, tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...text import shown

LONG_CELL = 30
"""Letters of a cell from which a table is one of text, whose rows are set as paragraphs on a phone."""
OUTCOMES = ("pass", "warn", "fail")
"""Cells that have a colour."""
_TEMPLATES = Environment(
    loader=PackageLoader("dvora.tools.pages", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class Table:
    """Rows of named cells, all with the same names.

    Args:
        rows: cells are shown as they are, numbers to four digits.
        caption: what it shows.
        headed: with the names above their columns.
    """

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    headed: bool = True

    @property
    def classes(self) -> dict[str, str]:
        """How each column is set: numbers on the right, long text in lines of its own on a phone."""
        return {name: _class_of([row[name] for row in self.rows]) for name in self.rows[0]}


@dataclass(frozen=True)
class Section:
    """A part of a page; on a wide screen two of them stand beside each other.

    Args:
        heading: above it.
        text: paragraphs.
        tables, pictures: below the text.
        wide: takes the whole width.
    """

    heading: str
    text: Sequence[str] = ()
    pictures: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    wide: bool = False


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    foot: str,
    verdict: Sequence[str] = (),
    figures: Mapping[str, Any] | None = None,
) -> str:
    """The HTML of a page that reads well on a phone, on a wide screen, and in the dark.

    Args:
        title: of the page.
        lead: what it is about, in a sentence or two.
        sections: in their order.
        foot: what made it.
        verdict: sentences that say what it all comes to, above everything else.
        figures: the few numbers that matter most, by name.
    """
    template = _TEMPLATES.get_template("page.html")
    return template.render(
        title=title, lead=lead, sections=sections, foot=foot, verdict=verdict, figures=figures, shown=_shown,
        OUTCOMES=OUTCOMES,
    ) + "\n"  # fmt: skip


def matrix(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[str, float]]], description: str
) -> Markup:
    """A table whose cells are shaded: a picture that takes its colours from the page, light or dark.

    Args:
        rows, columns: their names.
        cells: of each row: a text, and its shade from -1 (orange) over 0 (none) to 1 (blue).
        description: what it shows, for those who cannot see it.
    """
    named = [
        {"name": name, "cells": [{"text": text, "share": share} for text, share in line]}
        for name, line in zip(rows, cells, strict=True)
    ]
    template = _TEMPLATES.get_template("matrix.html")
    return Markup(template.render(rows=named, columns=columns, description=description, shown=_shown))


def _shown(value: Any) -> str:
    return value if isinstance(value, Markup) else shown(value)


def _class_of(cells: Sequence[Any]) -> str:
    if any(isinstance(cell, str) and (len(cell) > LONG_CELL or isinstance(cell, Markup)) for cell in cells):
        return "long"
    numbers = all(isinstance(cell, int | float | None) and not isinstance(cell, bool) for cell in cells)
    return "number" if numbers else ""
