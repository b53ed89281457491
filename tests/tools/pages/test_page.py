"""Pages: the same bytes each time, nothing loaded from elsewhere, and readable in a browser, wide, narrow and dark."""

import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from dvora.tools.pages.page import Section, Table, matrix, page
from dvora.tools.pages.pictures import label, new_figure, svg
from tests.tools.pages.seen import PHONE, WIDE, seen


def picture() -> Any:
    figure, (axes,) = new_figure(5, 3)
    axes.plot([1, 10, 100], [1e-3, 1e-2, 1e-1], label="a <b> & c")
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="loss")
    axes.legend()
    return svg(figure, 'a "line" <upwards>')


def example() -> str:
    rows = [{"layer": "encoder.layer.0.attention.self.query" * 3, "size": 1234, "share": 0.123456, "": "fail"}]
    section = Section("Layers & more", ["A <b>paragraph</b>."], [picture()], [Table(rows, "what it <shows>")])
    return page("Title <i>", "Lead.", [section, Section("Empty", tables=[Table([])])], "foot")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(example(), encoding="utf-8")
    return path


def test_the_same_page_has_the_same_bytes() -> None:
    assert example() == example()


def test_an_image_in_a_cell_is_left_as_it_is() -> None:
    image = Markup('<img alt="a cat">\n')
    assert str(image) in page("Title", "Lead.", [Section("Rows", tables=[Table([{"row": image}])])], "foot")


def test_text_is_text() -> None:
    text = example()
    assert "<b>paragraph" not in text
    assert "A &lt;b&gt;paragraph" in text
    assert 'aria-label="a &#34;line&#34; &lt;upwards&gt;"' in text


def test_pictures_leave_no_trace_in_matplotlib() -> None:
    import matplotlib
    from matplotlib import pyplot

    before, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    picture()
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == open_figures


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_reads_well(file: Path, width: int, scheme: str) -> None:
    with seen(file, width, scheme) as found:
        assert found.page.title() == "Title <i>"
        assert found.width() == width
        paper = sum(found.colour("body", "backgroundColor"))
        for selector in ("body", "h2", "svg text", "td", ".fail", "caption"):
            what = "fill" if selector == "svg text" else "color"
            assert abs(sum(found.colour(selector, what)) - paper) > 200, selector
        letters = found.page.eval_on_selector_all(
            "svg text", "all => all.map(each => each.getBoundingClientRect().height)"
        )
        assert min(letters) >= 9
        assert found.complaints == []


def test_a_wide_screen_is_used_and_a_phone_has_lines_of_many_words(tmp_path: Path) -> None:
    long = "a sentence of a review that goes on for a while, as reviews do, and then ends"
    table = Table([{"row": long, "true": "good", "predicted": "bad", "head alone": "good"}])
    file = tmp_path / "page.html"
    file.write_text(page("Title", "", [Section(name, tables=[table]) for name in "ab"], ""), encoding="utf-8")
    with seen(file, WIDE) as found:
        left, right = (box.bounding_box() for box in found.page.locator("section").all())
        assert left["y"] == right["y"]
        assert left["width"] + right["width"] > 0.9 * WIDE
    with seen(file, PHONE) as found:
        assert found.page.locator("td").first.bounding_box()["width"] > 0.8 * PHONE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_matrix_is_shaded_in_the_colours_of_the_page(tmp_path: Path, scheme: str) -> None:
    cells = [[("9", 0.9), ("", 0.0)], [("5", -0.5), ("5", 0.5)]]
    drawn = matrix(["a <b>", "c"], ["a <b>", "c"], cells, "which for which")
    file = tmp_path / "page.html"
    file.write_text(page("Title", "", [Section("Matrix", pictures=[drawn])], ""), encoding="utf-8")
    with seen(file, PHONE, scheme) as found:
        assert found.page.locator(".matrix tbody th").all_inner_texts() == ["a <b>", "c"]
        shades = found.page.eval_on_selector_all(
            ".matrix tbody td", "all => all.map(c => getComputedStyle(c).backgroundColor)"
        )
        assert shades == [
            "rgba(59, 130, 196, 0.72)",
            "rgba(0, 0, 0, 0)",
            "rgba(224, 138, 44, 0.4)",
            "rgba(59, 130, 196, 0.4)",
        ]


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
