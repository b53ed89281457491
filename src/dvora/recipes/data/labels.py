"""The values of a label column: classes by name, or numbers."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

MANY = 20
"""Classes, or different numbers, from which on a column looks like another kind of column."""


def class_name(value: object) -> str:
    """A label as a class; 1 and 1.0 are the same one."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def class_names(values: Sequence[object], column: str) -> tuple[str, ...]:
    """The classes in their order: by number if they all are whole numbers, else by name.

    Raises:
        ValueError: there is only one, or so many that the column can hardly be one of classes.
    """
    names = sorted({*map(class_name, values)})
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


def number(value: Any) -> float:
    """A label as a number.

    Raises:
        ValueError: it is none, or not finite.
    """
    try:
        label = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number") from None
    if not isfinite(label):
        raise ValueError(f"{value!r} is not finite")
    return label


def are_numbers(values: Sequence[object]) -> bool:
    """Whether labels look like numbers: all are, and some have a fraction or there are many different ones."""
    try:
        numbers = {number(value) for value in values}
    except ValueError:
        return False
    return len(numbers) > MANY or any(not value.is_integer() for value in numbers)
