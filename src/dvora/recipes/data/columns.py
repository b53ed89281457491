"""Which columns of a table hold the text, the second text and the label: as set, or guessed from their names."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ...text import did_you_mean, listed
from ..settings import Settings
from .tables import Note

TEXT = ("text", "sentence", "review", "content", "comment", "message", "tweet", "title", "description", "question")
FIRST_TEXT = ("sentence1", "text1", "text_a", "premise", "question1", "first", *TEXT)
SECOND_TEXT = ("sentence2", "text2", "text_b", "hypothesis", "question2", "second", "answer", "context")
CLASS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "y")
NUMBER = ("label", "labels", "score", "rating", "value", "target", "similarity", "stars", "y")
ENTITIES = ("entities", "spans", "labels", "label", "ner")
LANGUAGE = ("messages", "text", "content", "document", "prompt")

KINDS = {"text_column": "text", "second_text_column": "text2", "label_column": "label"}
"""Settings, and what the columns that they name are called in examples and records."""


def chosen_columns(path: Path, names: Iterable[str], settings: Settings, note: Note) -> dict[str, str]:
    """The columns of a task, by `KINDS`, in the table at `path`, which has columns of these names.

    Raises:
        ValueError: one of them is not there, or cannot be guessed.
    """
    likely, names = _likely_names(settings), [*names]
    chosen = {key: name for key in likely if (name := getattr(settings, key)) is not None}
    for key, name in chosen.items():
        check_column(path, key, name, names)
    if len({*chosen.values()}) < len(chosen):
        raise ValueError(f"two columns have one name: {', '.join(f'{key}: {name}' for key, name in chosen.items())}")
    guessed = [key for key in likely if key not in chosen]
    for key in guessed:
        left = {name.lower(): name for name in reversed(names) if name not in chosen.values()}
        if near := [left[name] for name in likely[key] if name in left]:
            chosen[key] = near[0]
    for key in guessed:
        left_over = [name for name in names if name not in chosen.values()]
        if key not in chosen and len(left_over) != 1:
            raise ValueError(f"{path}: which column is the {key}? Set {_option(key)} to one of {listed(names)}")
        chosen.setdefault(key, next(iter(left_over), ""))
        note(f"{key}: {chosen[key]} (guessed)")
    return {KINDS[key]: chosen[key] for key in likely}


def check_column(path: Path, key: str, name: str, names: Iterable[str]) -> None:
    """Refuse the name that a setting, the `key`, gives to a column, where the table has only these `names`.

    Raises:
        ValueError: it is.
    """
    if name not in (names := [*names]):
        raise ValueError(f"{path} has no column {name!r}; set {_option(key)}, {did_you_mean(name, names)}")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _likely_names(settings: Settings) -> dict[str, Sequence[str]]:
    """The columns that the task needs, and what they are likely to be called."""
    if settings.task == "causal-lm":
        return {"text_column": LANGUAGE}
    if settings.task == "token-classification":
        return {"text_column": TEXT, "label_column": ENTITIES}
    if settings.task != "sentence-pairs" and settings.second_text_column is None:
        return {"text_column": TEXT, "label_column": NUMBER if settings.task == "regression" else CLASS}
    numbers = settings.task == "regression" or settings.label_kind == "numbers"
    return {
        "text_column": FIRST_TEXT,
        "second_text_column": SECOND_TEXT,
        "label_column": NUMBER if numbers else (*CLASS, *NUMBER),
    }
