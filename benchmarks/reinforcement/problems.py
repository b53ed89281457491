"""Two problems that SmolLM2 sometimes solves, with examples before the question and an answer that a program checks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
TRAIN, VALIDATION, TEST = 400, 100, 300


@dataclass(frozen=True)
class Question:
    """A prompt, and the only right first line of its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Problem:
    """Questions, none in two splits.

    Args:
        tokens: how many an answer may have.
    """

    tokens: int
    train: tuple[Question, ...]
    validation: tuple[Question, ...]
    test: tuple[Question, ...]


def reward(completion: str, answer: str) -> float:
    """1 if the first line is the answer and nothing else, else 0."""
    return float(completion.split("\n")[0].strip() == answer)


def sums() -> Problem:
    """Sums of two numbers up to 30."""
    pairs = [(a, b) for a in range(1, 31) for b in range(1, 31)]
    return _split(4, pairs, lambda pair: Question(f"11 + 4 = 15\n{pair[0]} + {pair[1]} =", str(sum(pair))))


def dates() -> Problem:
    """Dates in words to dates in the form of ISO 8601."""
    days = [(year, month, day) for year in range(1950, 2030) for month in range(1, 13) for day in range(1, 29)]
    days.remove((1987, 3, 5))

    def question(date: tuple[int, ...]) -> Question:
        year, month, day = date
        asked = f"{MONTHS[month - 1]} {day}, {year} ="
        return Question(f"March 5, 1987 = 1987-03-05\n{asked}", f"{year}-{month:02d}-{day:02d}")

    return _split(13, days, question)


def _split(tokens: int, every: list[tuple[int, ...]], question: Callable[[tuple[int, ...]], Question]) -> Problem:
    chosen = np.random.default_rng(0).permutation(len(every))[: TRAIN + VALIDATION + TEST]
    rows = tuple(question(every[row]) for row in chosen)
    return Problem(tokens, rows[:TRAIN], rows[TRAIN : TRAIN + VALIDATION], rows[TRAIN + VALIDATION :])


PROBLEMS: dict[str, Callable[[], Problem]] = {"sums": sums, "dates": dates}
"""By the names in the result file."""
