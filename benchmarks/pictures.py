"""How pictures of the documentation look: one colour a method, on light and dark pages, with text that stays text."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
WIDTH = 7.0
"""Inches of a picture, at which its text has about the size of the page's."""
METHODS = {
    "DVoRA": "#2378d6",
    "DVoRA, r=64": "#c43bb0",
    "VeRA": "#de7b12",
    "LoRA": "#26985a",
    "LoRA r=1": "#84a318",
    "DoRA": "#d64545",
    "HyperAdapt": "#8a68d8",
    "RoAd": "#1f9fb0",
    "SHiRA": "#a3703c",
    "full fine-tuning": "#707880",
}
"""By method; of a brightness between those of a white page and a dark one, so that both can have the same."""
FAINT = "#8b90a0"
"""Of lines that guide the eye, and of what has no colour of its own."""
_DARK = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), "#d9dbe2")
_COMMON = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # The same bytes from the same figures.
    "svg.hashsalt": "dvora",
}
THEMES = {
    "": {**_COMMON, "grid.color": "#e4e6ea"},
    "-dark": {**_COMMON, **_DARK, "grid.color": "#3a3d4a", "figure.facecolor": "none", "axes.facecolor": "none"},
}
"""Settings of matplotlib, by what a file's name ends in."""


def save(name: str, draw: Callable[[], Figure], folder: Path = FOLDER) -> None:
    """Write `name.svg` and `name-dark.svg`."""
    folder.mkdir(exist_ok=True)
    for ending, theme in THEMES.items():
        with plt.rc_context(theme):
            figure = draw()
            nothing = {"Date": None, "Creator": None}
            figure.savefig(folder / f"{name}{ending}.svg", metadata=nothing)
            plt.close(figure)


def ink() -> str:
    """The colour of text in the theme that is drawn."""
    return str(plt.rcParams["text.color"])
