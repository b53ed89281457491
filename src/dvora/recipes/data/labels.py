"""What a column of labels is: classes, numbers or entities, how often each occurs, and what looks wrong with it."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from math import inf, isfinite
from typing import Any

from ..settings import Settings
from .entities import tags_of
from .examples import Example, each
from .splits import same_text
from .tables import Note

MANY = 20
"""Classes, or different numbers, from which on a column looks like another kind of column."""
LARGEST = 1e9
"""Of a label that is a number: gradients grow with its square, and what clips them squares them, up to 3e38."""
LETTERS = 40
"""Of a text that a note shows."""


def classes_of(train: Sequence[Example], column: str, settings: Settings, note: Note) -> tuple[str, ...]:
    """The names of the classes; none where the labels are numbers."""
    labels = [example.row["label"] for example in train]
    if settings.task == "token-classification":
        if not (names := {one.label for entities in labels for one in entities}):
            raise ValueError(f"column {column!r} has no entity in any row; there is nothing to predict")
        return tags_of([*names])
    numbers = settings.task == "regression" or settings.label_kind == "numbers"
    if settings.task == "sentence-pairs" and settings.label_kind is None:
        numbers = _are_numbers(labels)
        note(f"label_kind: {'numbers' if numbers else 'classes'} (seen from {column!r})")
    if numbers:
        return ()
    _check_single(train, column)
    classes = _class_names(labels, column)
    counts = Counter(map(_class_name, labels))
    shown = [f"{name} {count:,}" for name, count in counts.most_common()]
    more = f" and {len(shown) - MANY} more" if len(shown) > MANY else ""
    note(f"classes, with their rows: {', '.join(shown[:MANY])}{more}")
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(same_text(name).casefold(), []).append(f"{name!r} ({counts[name]:,})")
    for twins in alike.values():
        if len(twins) > 1:
            note(f"classes that differ in case or spaces only: {', '.join(twins)}; write them alike if they are one")
    return classes


def _check_single(examples: Sequence[Example], column: str) -> None:
    """Refuse cells with several labels: lists, and what several labels are joined to.

    Raises:
        ValueError: there is such a cell.
    """
    joined = _joined({str(example.row["label"]) for example in examples})
    for example in examples:
        value = example.row["label"]
        if isinstance(value, list | dict) or str(value) in joined:
            raise ValueError(
                f"{example.place}: column {column!r} holds {value!r}, several labels, and a classifier gives one. Make "
                "a column of yes and no for each label, and train a classifier on each; a server answers with all of "
                "them in one pass (how-to/route-messages.md)"
            )


def _joined(labels: Collection[str]) -> set[str]:
    """Of labels those whose parts, between separators, are labels too, or between ; and | parts of other labels.

    A class may be called "Bath, bed and beyond".
    """
    joined = set()
    for separator in ";|,":
        parts = {label: {part.strip() for part in label.split(separator)} - {""} for label in labels}
        parts = {label: of for label, of in parts.items() if len(of) > 1}
        in_how_many = Counter(part for of in parts.values() for part in of)
        for label, of in parts.items():
            if all(part in labels or (separator != "," and in_how_many[part] > 1) for part in of):
                joined.add(label)
    return joined


def encode_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Replace raw labels by indices of the classes, or by numbers where there are no classes."""
    indices = {name: index for index, name in enumerate(labels)}

    def encode(example: Example) -> None:
        label = example.row["label"]
        try:
            if isinstance(label, tuple):
                example.row["label"] = tuple(one._replace(label=indices[f"B-{one.label}"]) for one in label)
                return
            example.row["label"] = indices[_class_name(label)] if labels else _number(label)
            if not labels and abs(example.row["label"]) > LARGEST:
                raise ValueError(f"{label!r} is beyond {LARGEST:,.0f}, too large to train with; divide the column")
        except KeyError as error:
            name = str(error.args[0]).removeprefix("B-") if isinstance(label, tuple) else label
            raise ValueError(f"{example.place}: the class {name!r} does not occur in the training data") from None
        except ValueError as error:
            raise ValueError(f"{example.place}: the label {error}") from None

    each(examples, encode)


def _class_name(value: object) -> str:
    """A label as a class; 1 and 1.0 are the same one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _class_names(values: Sequence[object], column: str) -> tuple[str, ...]:
    """The classes in their order: by number if they all are whole numbers, else by name."""
    names = sorted({*map(_class_name, values)})
    if len(names) == 1:
        raise ValueError(f"column {column!r} has the single class {names[0]!r}; there is nothing to predict")
    if len(names) > max(MANY, len(values) / 2):
        raise ValueError(
            f"column {column!r} has {len(names)} different labels in {len(values)} rows; is it the right label_column? "
            "For numbers take the task regression, or label_kind: numbers"
        )
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def _number(value: Any) -> float:
    """A label as a finite number."""
    try:
        label = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    except OverflowError:
        label = inf
    if not isfinite(label):
        raise ValueError(f"{value!r} is not finite")
    return label


def _are_numbers(values: Sequence[object]) -> bool:
    """Whether labels look like numbers: all are, and some have a fraction or there are many different ones."""
    try:
        numbers = {_number(value) for value in values}
    except ValueError:
        return False
    return len(numbers) > MANY or any(not value.is_integer() for value in numbers)


def torn_texts(parts: Iterable[Sequence[Example]], labels: Sequence[str]) -> list[str]:
    """Texts that have several labels, each with these and the rows."""
    seen: dict[str, dict[Any, Example]] = {}
    for example in (example for part in parts for example in part if {"text", "label"} <= example.row.keys()):
        seen.setdefault(example.key, {}).setdefault(example.row["label"], example)

    def named(label: Any) -> Any:
        return labels[label] if labels and isinstance(label, int) else label

    torn = []
    for examples in seen.values():
        if len(examples) > 1:
            places = ", ".join(f"{one.place}: {named(label)}" for label, one in examples.items())
            torn.append(f"{next(iter(examples.values())).row['text'][:LETTERS]!r} ({places})")
    return torn
