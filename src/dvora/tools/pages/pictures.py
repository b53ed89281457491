"""Figures as inline SVG that takes its text colour from the page, light or dark."""

import io
import re
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from ...text import visible

COLOURS = ("#3b82c4", "#e08a2c", "#3fa35b", "#c4524f", "#8f6fc0", "#9c6f5c", "#cf76b0", "#8a8a8a", "#a8a832", "#35a8b5")
"""Distinguishable on white and on black: matplotlib's ten, with similar brightness."""
GREY = COLOURS[7]
_STYLE: Any = {
    "svg.fonttype": "none",
    # Names inside the file come from this instead of from the time.
    "svg.hashsalt": "dvora",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
}

_REM_PER_INCH = 8.0


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure, in inches, that nothing but its owner knows of, with empty axes, one below the other."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def label(text: str) -> str:
    """A name from a file as text in a figure, where dollars would begin formulas and underscores hide it."""
    shown = visible(text).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown


def svg(figure: Figure, description: str) -> Markup:
    """The figure as an element of a page, the same bytes each time.

    Args:
        description: what it shows, for those who cannot see it.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r' (width|height)="[\d.]+pt"', "", drawn, count=2)
    # Black is what matplotlib draws text and axes in; text without a colour is black too.
    drawn = re.sub(r"<text(?=[ >])", '<text fill="currentColor"', drawn.replace("#000000", "currentColor"))
    # An inch is 72 units of the file: letters are as large as those of the page, and on a phone not much smaller.
    width = f"max-width: {figure.get_figwidth() * _REM_PER_INCH:.0f}rem"
    label = f'<svg role="img" aria-label="{escape(description)}" style="{width}"'
    return Markup(drawn.replace("<svg", label, 1))
