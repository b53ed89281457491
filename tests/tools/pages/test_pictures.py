"""Names in pictures are text."""

import re

from dvora.tools.pages.pictures import label, new_figure, svg


def test_names_in_figures_are_no_formulas() -> None:
    figure, (axes,) = new_figure(3, 3)
    names = [r"$\frac$", "$3 to $5", r"a\$b", "_a", "\x1b[31m", "100 % $"]
    axes.plot([1, 2], [1, 100], label=label(names[0]))
    axes.set(yscale="log")
    axes.set_xticks(range(len(names)), [*map(label, names)])
    axes.legend()
    drawn = svg(figure, "names")
    for name in (r"$\frac$", "$3 to $5", r"a\$b", "_a", r"\x1b[31m", "100 % $"):
        assert f"{name}</text>" in drawn
    # Powers of ten still are formulas, of matplotlib's own.
    assert not re.search("<text[^>]*>[^<]*mathdefault", drawn)
