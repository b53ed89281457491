"""Schedules: descriptions are distinct, and the checker knows a right answer from a wrong one."""

import locale

from materials.schedules import COUNT, described, schedules


def test_no_schedule_is_described_twice_and_the_answers_are_right() -> None:
    parts = schedules()
    descriptions = [each for part in parts.values() for each in part.descriptions]
    assert len(descriptions) == len(set(descriptions)) == COUNT
    assert {name: len(part) for name, part in parts.items()} == {"train": 2800, "validation": 400, "test": 800}
    test = parts["test"]
    assert all(described(answer) == asked for answer, asked in zip(test.expressions, test.descriptions, strict=True))


def test_the_checker_takes_another_way_to_write_it_and_refuses_what_is_no_schedule() -> None:
    assert described("30 17 * * 1") == described("30 17 * * MON") == "At 05:30 PM, only on Monday"
    assert described("30 17 * * 2") != described("30 17 * * 1")
    assert {described(text) for text in ("", "hello", "1 2 3", "a b c d e", "5 4 * 13 *")} == {""}


def test_descriptions_are_the_same_in_every_locale() -> None:
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        assert described("30 17 * * 1") == "At 05:30 PM, only on Monday"
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
