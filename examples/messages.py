"""Messages, and what sixteen classifiers should say of them: Webster's definitions, film reviews, lines of code."""

from collections.abc import Callable, Sequence

import numpy as np

from materials.data import movie_ratings, movie_reviews
from materials.many_classes import code_languages, webster_fields
from materials.splits import Texts, TextTask

DEPARTMENTS = (
    *("anatomy", "architecture", "botany", "chemistry", "heraldry", "law", "mathematics", "medicine", "music"),
    *("ships", "the church", "the military"),
)
LANGUAGES = ("bash", "cpp", "html", "java", "haskell", "vim")
Rows = list[tuple[str, str]]
"""Texts, and a word on each."""


def labelled(part: str, count: Callable[[str], int]) -> dict[str, Rows]:
    """The rows of each classifier, as many of each class.

    Args:
        part: train, validation or test.
        count: how many rows the classifier of a name has.
    """
    definitions, reviews, lines = (rows_of(part, task()) for task in (webster_fields, movie_reviews, code_languages))
    kinds: dict[str, Sequence[Rows]] = {}
    for field in DEPARTMENTS:
        yes = [(text, "yes") for text, word in definitions if word == field]
        # A message that is no definition is none of theirs either.
        no = [[(text, "no") for text, word in rows if word != field] for rows in (definitions, reviews, lines)]
        kinds[field.removeprefix("the ")] = [yes, *no]
    sources = {"definition": definitions, "review": reviews, "code": lines}
    kinds["source"] = [[(text, name) for text, _ in rows] for name, rows in sources.items()]
    kinds["opinion"] = [[row for row in reviews if row[1] == word] for word in ("bad", "good")]
    kinds["language"] = [[row for row in lines if row[1] == name] for name in LANGUAGES]
    kinds["rating"] = [rows_of(part, movie_ratings())]
    return {name: mixed(of_name, count(name)) for name, of_name in kinds.items()}


def rows_of(part: str, task: TextTask) -> Rows:
    """A part of a task, with the names of classes or the numbers of ratings."""
    texts: Texts = getattr(task, part)
    words = [task.classes[label] if task.classes else f"{label:.2f}" for label in texts.labels.tolist()]
    return list(zip(texts.texts, words, strict=True))


def mixed(kinds: Sequence[Rows], count: int) -> Rows:
    """So many rows, in equal parts of each kind, in a random order that is always the same."""
    random = np.random.default_rng(0)
    chosen = [kind[row] for kind in kinds for row in random.permutation(len(kind))[: count // len(kinds)]]
    return [chosen[row] for row in random.permutation(len(chosen))]
