"""A page of sections with text, tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .text import shown

_TEMPLATES = Environment(
    loader=PackageLoader("dvora.tools.pages", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@dataclass(frozen=True)
class Table:
    """Rows of named cells, all with the same names.

    Args:
        rows: cells are shown as they are, numbers to four digits.
        caption: what it shows.
    """

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        heading: above it.
        text: paragraphs.
        tables, pictures: below the text.
    """

    heading: str
    text: Sequence[str] = ()
    pictures: Sequence[Markup] = ()
    tables: Sequence[Table] = ()


def page(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The HTML of a page that reads well on a phone, on a screen, and in the dark.

    Args:
        title: of the page.
        lead: what it is about, in a sentence or two.
        sections: in their order.
        foot: what made it.
    """
    template = _TEMPLATES.get_template("page.html")
    return (
        template.render(title=title, lead=lead, sections=sections, foot=foot, shown=shown, is_number=is_number) + "\n"
    )


def is_number(value: Any) -> bool:
    """Whether a cell stands on the right."""
    return isinstance(value, int | float) and not isinstance(value, bool)
