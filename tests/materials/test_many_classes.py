"""Tasks of many classes: no text twice, every class learnable, and nothing in a text that gives its class away."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from materials import many_classes
from materials.fetch import FetchError
from materials.splits import TextTask, same_text


def loaded(loader: Callable[[], TextTask]) -> TextTask:
    try:
        return loader()
    except FetchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("loader", "classes", "rows"),
    [
        (many_classes.wordnet_topics, 25, 81_433),
        (many_classes.countries, 40, 22_863),
        (many_classes.code_languages, 40, 17_000),
        (many_classes.webster_fields, 24, 15_247),
    ],
)
def test_every_class_has_rows_and_no_text_comes_twice(loader: Callable[[], TextTask], classes: int, rows: int) -> None:
    task = loaded(loader)
    parts = (task.train, task.validation, task.test)
    texts = [same_text(text) for part in parts for text in part.texts]
    assert len(texts) == len(set(texts))
    # Later versions of a Debian package may have a few rows more or less.
    assert len(texts) == pytest.approx(rows, rel=0.05)
    assert len(task.classes) == classes
    counts = Counter(task.train.labels.tolist())
    assert set(counts) == set(range(classes))
    assert min(counts.values()) >= 30


def test_definitions_do_not_name_their_field() -> None:
    task = loaded(many_classes.webster_fields)
    marks = re.compile("|".join(re.escape(f"({name})") for name in many_classes.FIELDS))
    assert not [text for text in task.train.texts if marks.search(text) or "{" in text or "[" in text]
