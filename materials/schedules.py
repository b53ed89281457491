"""Descriptions of schedules and their cron expressions: a task of real generation, whose answers a program checks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from materials.splits import partition

COUNT = 4000
WEEKDAYS = ("*", "*", "*", "1-5", "0", "1", "2", "3", "4", "5", "6", "0,6", "1,3,5", "2,4")


@dataclass(frozen=True)
class Schedules:
    """Rows of one split.

    Args:
        descriptions: such as "At 05:30 PM, only on Monday".
        expressions: such as "30 17 * * 1".
    """

    descriptions: tuple[str, ...]
    expressions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.descriptions)

    def first(self, count: int) -> "Schedules":
        """The first `count` rows."""
        return Schedules(self.descriptions[:count], self.expressions[:count])


def schedules(seed: int = 0) -> dict[str, Schedules]:
    """4,000 schedules, none described like another, split in "train", "validation" and "test"."""
    generator = np.random.default_rng(seed)
    rows: dict[str, str] = {}
    while len(rows) < COUNT:
        expression = _expression(generator)
        rows.setdefault(described(expression), expression)
    every = list(rows.items())
    parts = zip(("train", "validation", "test"), partition(COUNT, seed), strict=True)
    return {
        name: Schedules(tuple(every[row][0] for row in chosen), tuple(every[row][1] for row in chosen))
        for name, chosen in parts
    }


def described(expression: str) -> str:
    """What cron-descriptor says of a cron expression, in the same English everywhere; empty where it is none."""
    from cron_descriptor import FormatException, MissingFieldException, Options, WrongArgumentException, get_description

    try:
        return str(get_description(expression, Options(locale_code="en_US")))
    except (FormatException, MissingFieldException, WrongArgumentException):
        return ""


def _expression(generator: np.random.Generator) -> str:
    """A schedule as people write them: at a time, or every few minutes or hours, on some days."""

    def one(*choices: Any) -> str:
        return str(choices[generator.integers(len(choices))])

    def number(low: int, high: int) -> str:
        return str(generator.integers(low, high + 1))

    start = int(generator.integers(0, 18))
    span = f"{start}-{start + int(generator.integers(2, 6))}"
    every = f"*/{one(2, 3, 5, 10, 15, 20, 30)}"
    minute, hour = (
        (number(0, 59), number(0, 23)),
        (number(0, 59), number(0, 23)),
        (every, one("*", number(0, 23), span)),
        (one(0, number(1, 59)), one(f"*/{one(2, 3, 4, 6, 8, 12)}", span)),
    )[generator.integers(4)]
    weekday = one(*WEEKDAYS)
    day = one("*", number(1, 28)) if weekday == "*" else "*"
    month = one("*", "*", number(1, 12), f"*/{one(2, 3, 4, 6)}")
    return f"{minute} {hour} {day} {month} {weekday}"
