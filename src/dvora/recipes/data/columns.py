"""Which columns of a table hold the text, the second text and the label: as set, or guessed from their names."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...tools.pages.text import did_you_mean, listed
from ..settings import Settings
from .tables import Table

TEXT = ("text", "sentence", "review", "content", "comment", "message", "tweet", "title", "description", "question")
FIRST_TEXT = ("sentence1", "text1", "text_a", "premise", "question1", "first", *TEXT)
SECOND_TEXT = ("sentence2", "text2", "text_b", "hypothesis", "question2", "second", "answer", "context")
CLASS = ("label", "labels", "class", "category", "target", "sentiment", "topic", "y")
NUMBER = ("label", "labels", "score", "rating", "value", "target", "similarity", "stars", "y")
LANGUAGE = ("messages", "text", "content", "document", "prompt")


@dataclass(frozen=True)
class Columns:
    """Names of the columns; None where the task has none."""

    text: str
    second: str | None
    label: str | None
    notes: tuple[str, ...]


def chosen_columns(table: Table, settings: Settings) -> Columns:
    """The columns of a task.

    Raises:
        ValueError: one of them is not there, or cannot be guessed.
    """
    likely = _likely_names(settings)
    chosen = {key: name for key in likely if (name := getattr(settings, key)) is not None}
    for key, name in chosen.items():
        if name not in table.columns:
            raise ValueError(
                f"{table.path} has no column {name!r} ({key}), {did_you_mean(name, table.columns)} "
                f"Its columns: {listed(table.columns)}"
            )
    if len({*chosen.values()}) < len(chosen):
        raise ValueError(f"two columns have one name: {', '.join(f'{key}: {name}' for key, name in chosen.items())}")
    for key, names in likely.items():
        left = {name.lower(): name for name in reversed(table.columns) if name not in chosen.values()}
        if key not in chosen and (name := next((left[name] for name in names if name in left), None)):
            chosen[key] = name
    for key in likely:
        left_over = [name for name in table.columns if name not in chosen.values()]
        if key not in chosen and len(left_over) != 1:
            raise ValueError(f"{table.path}: which of its columns ({listed(table.columns)}) is the {key}? Set it")
        chosen.setdefault(key, left_over[0] if left_over else "")
    notes = tuple(f"{key}: {name} (guessed)" for key, name in chosen.items() if getattr(settings, key) is None)
    return Columns(chosen["text_column"], chosen.get("second_text_column"), chosen.get("label_column"), notes)


def _likely_names(settings: Settings) -> dict[str, Sequence[str]]:
    """The columns that the task needs, and what they are likely to be called."""
    if settings.task == "causal-lm":
        return {"text_column": LANGUAGE}
    if settings.task != "sentence-pairs" and settings.second_text_column is None:
        return {"text_column": TEXT, "label_column": NUMBER if settings.task == "regression" else CLASS}
    numbers = settings.task == "regression" or settings.label_kind == "numbers"
    return {
        "text_column": FIRST_TEXT,
        "second_text_column": SECOND_TEXT,
        "label_column": NUMBER if numbers else (*CLASS, *NUMBER),
    }
