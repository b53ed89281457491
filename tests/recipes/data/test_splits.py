"""Splits: nothing is lost, nothing is in two parts, classes keep their shares, and the seed decides."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dvora.recipes.data.splits import same_text, split_rows

ROWS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=80)
SHARE = st.floats(0, 0.45)
SEED = st.integers(0, 2**32 - 1)


@given(ROWS, SHARE, SHARE, SEED)
def test_every_row_is_in_one_part_and_no_key_in_two(
    rows: list[tuple[int, int]], validation: float, test: float, seed: int
) -> None:
    keys, classes = [key for key, _ in rows], [name for _, name in rows]
    parts = split_rows(keys, classes, validation, test, seed)
    assert sorted(index for part in parts for index in part) == list(range(len(rows)))
    held = [{keys[index] for index in part} for part in parts]
    assert sum(map(len, held)) == len({*keys})
    assert parts == split_rows(keys, classes, validation, test, seed)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), SHARE, SHARE, SEED)
def test_classes_keep_their_shares_and_are_all_trained_on(
    classes: list[int], validation: float, test: float, seed: int
) -> None:
    parts = split_rows(range(len(classes)), classes, validation, test, seed)
    for part, share in (("validation", validation), ("test", test)):
        counts = Counter(classes[index] for index in getattr(parts, part))
        for name, count in Counter(classes).items():
            assert abs(counts[name] - share * count) <= 2
        # A class of one row is never held out, which may be owed for the rest of the classes.
        assert abs(sum(counts.values()) - share * len(classes)) <= 4
    assert {classes[index] for index in parts.train} == {*classes}


def test_shares_are_those_asked_for() -> None:
    parts = split_rows(range(1000), [index % 7 for index in range(1000)], 0.1, 0.2, 0)
    assert [len(part) for part in parts] == [700, 100, 200]


def test_case_and_spacing_do_not_make_another_text() -> None:
    assert same_text(" A  Straße\n") == same_text("a STRASSE")
    assert same_text("a b") != same_text("ab")
