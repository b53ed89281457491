"""Columns of labels: what is said of them, and what is refused."""

import json
from pathlib import Path

import pytest

from tests.recipes.data.test_run_data import csv, load


def rows(*labels: str, count: int = 10) -> list[str]:
    """Different texts, so many of each label."""
    return [f"{place} {label} words,{label}" for label in labels for place in range(count)]


def test_classes_are_shown_with_their_rows_and_twins_are_named(tmp_path: Path) -> None:
    table = csv(
        tmp_path, "text,label", *rows("urgent", count=12), *rows("normal"), "one more,Urgent", "and one,  normal "
    )
    found = load(table)
    assert found.labels == ("Urgent", "normal", "urgent")
    assert "classes, with their rows: urgent 12, normal 11, Urgent 1" in found.notes
    twins = "classes that differ in case or spaces only: 'Urgent' (1), 'urgent' (12); write them alike if they are one"
    assert twins in found.notes


def test_of_many_classes_the_commonest_are_shown(tmp_path: Path) -> None:
    found = load(csv(tmp_path, "text,label", *(row for number in range(22) for row in rows(f"c{number}", count=4))))
    (shown,) = (note for note in found.notes if note.startswith("classes, with their rows"))
    assert shown.endswith("c19 4 and 2 more")


def test_other_columns_that_could_be_the_label_are_named(tmp_path: Path) -> None:
    lines = [f"words {n},{n},{('billing', 'login')[n % 2]},{('high', 'low', 'none')[n % 3]}" for n in range(40)]
    table = csv(tmp_path, "text,id,topic,urgency", *lines)
    said = "label_column: it could also be urgency, with few different values"
    assert said in load(table).notes
    assert said not in load(table, label_column="topic").notes


def test_all_wrong_rows_are_named_at_once(tmp_path: Path) -> None:
    good = rows("a", "b")
    with pytest.raises(ValueError, match=r"row 1: column 'label' is empty.*; .*row 3: column 'text' is empty"):
        load(csv(tmp_path, "text,label", "x,", good[0], " ,a", *good))
    with pytest.raises(ValueError, match=r"row 9: column 'label' is empty.*; and 5 more$"):
        load(csv(tmp_path, "text,label", *(f"x {n}," for n in range(15)), *good))
    with pytest.raises(
        ValueError, match=r"row 1: the label 'x' is not a number; .*row 2: the label 'y' is not a number"
    ):
        load(csv(tmp_path, "text,label", "a,x", "b,y", "c,1", "d,2"), "regression")
    with pytest.raises(ValueError, match=r"row 2: 3 cells where .*; so have other numbers of cells the rows 4, 5"):
        load(csv(tmp_path, "text,label", "a,b", "a,b,c", "d,e", "f", "g,h,i"))


@pytest.mark.parametrize(
    "labels",
    [
        ("billing", "login", "billing;login"),
        ("billing", "login", "login, billing"),
        ("billing|login", "login|urgent", "urgent|billing"),
    ],
)
def test_a_cell_with_several_labels_is_refused_with_the_way_to_go(tmp_path: Path, labels: tuple[str, ...]) -> None:
    lines = [f'{place} {number},"{label}"' for number, label in enumerate(labels) for place in range(10)]
    with pytest.raises(ValueError, match=r"several labels, and a classifier gives one.*how-to/route-messages\.md"):
        load(csv(tmp_path, "text,label", *lines))


def test_lists_of_labels_are_refused(tmp_path: Path) -> None:
    values = [{"text": f"words {n}", "label": ["a"] if n % 2 else ["a", "b"]} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)))
    with pytest.raises(ValueError, match=r"row 1: column 'label' holds \['a', 'b'\], several labels"):
        load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("labels", [("Bath, bed and beyond", "Garden"), ("a;b", "c;d"), ("1,5", "2,5"), ("a; ", "b; ")])
def test_names_with_separators_in_them_are_names(tmp_path: Path, labels: tuple[str, ...]) -> None:
    lines = [f'{place} {number},"{label}"' for number, label in enumerate(labels) for place in range(10)]
    assert load(csv(tmp_path, "text,label", *lines)).labels == tuple(sorted(label.strip() for label in labels))


def test_a_double_quote_that_is_not_closed_is_named(tmp_path: Path) -> None:
    good = rows("a", "b")
    for line in ('"open,a', '"open, a'):
        with pytest.raises(ValueError, match=r"row 21: the double quote that opens a cell in line 22 is not closed"):
            load(csv(tmp_path, "text,label", *good, line, *good))
    with pytest.raises(ValueError, match="a double quote in it may not be closed"):
        load(csv(tmp_path, "text,label", *good, '"open,a', 'x","b",a', *good))
