"""Duplicates leave before the split; the parts are disjoint, complete and set by the seed."""

import pytest

from materials.splits import partition, text_task


@pytest.mark.parametrize("count", [10, 11, 99, 1000])
def test_every_row_is_in_one_part(count: int) -> None:
    train, validation, test = partition(count, seed=3)
    assert sorted([*train, *validation, *test]) == list(range(count))
    assert (len(validation), len(test)) == (count // 10, count // 5)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="count=9"):
        partition(9, seed=0)


def test_labels_stay_with_their_texts() -> None:
    texts = [f"text {number}" for number in range(40)] + ["TEXT 7"]
    task = text_task("numbers", ("even", "odd"), texts, [number % 2 for number in range(40)] + [0], seed=0)
    parts = (task.train, task.validation, task.test)
    assert sum(len(part) for part in parts) == 40
    for part in parts:
        assert [int(text.split()[1]) % 2 for text in part.texts] == part.labels.tolist()
