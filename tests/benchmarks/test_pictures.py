"""Pictures of the documentation: a light and a dark file, their text as text, the same bytes each time."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.pictures import METHODS, ink, save

LIGHTEST, DARKEST = 0.4, 0.12
"""Luminances between which a colour stands out from a white and from a dark page."""


def drawn() -> Figure:
    figure, axes = plt.subplots()
    axes.plot([0, 1], color=METHODS["DVoRA"])
    axes.text(0, 0, "said", color=ink())
    return figure


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_picture_is_two_files_that_differ_in_the_theme_only(tmp_path: Path) -> None:
    save("a", drawn, tmp_path)
    light, dark = ((tmp_path / name).read_text(encoding="utf-8") for name in ("a.svg", "a-dark.svg"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-dark.svg", "a.svg"]
    assert ">said</text>" in light
    assert ">said</text>" in dark
    assert METHODS["DVoRA"] in light
    assert METHODS["DVoRA"] in dark
    assert ("#d9dbe2" in light, "#d9dbe2" in dark) == (False, True)
    assert plt.get_fignums() == []


def test_the_same_figures_make_the_same_bytes(tmp_path: Path) -> None:
    save("a", drawn, tmp_path / "one")
    save("a", drawn, tmp_path / "two")
    assert (tmp_path / "one" / "a.svg").read_bytes() == (tmp_path / "two" / "a.svg").read_bytes()


def test_every_method_has_a_colour_of_its_own_that_both_pages_can_show() -> None:
    assert len(set(METHODS.values())) == len(METHODS)
    assert all(DARKEST < luminance(colour) < LIGHTEST for colour in METHODS.values())
