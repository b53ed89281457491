"""Stand-ins for the text that MetaMathQA reads: the same names and columns, with sums and sentences made here."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

NAMES = ("Ada", "Emmy", "Sofia", "Alan", "Carl", "Leonhard")
THINGS = ("apples", "books", "coins", "pens")
TRAINED, VALIDATED, TESTED, ARTICLES = 400, 60, 12, 8
"""Rows of each. PEFT's script takes 50 of those for validation."""

Row = dict[str, str]


def write_text(folder: Path) -> None:
    """Write the three data sets into the folder that a script runs in, where `load_dataset` looks before the hub."""
    chance = random.Random(0)
    _write(folder / "meta-math" / "MetaMathQA" / "train.jsonl", (_trained(chance) for _ in range(TRAINED)))
    exams = folder / "openai" / "gsm8k"
    for split, count in (("train", VALIDATED), ("test", TESTED)):
        _write(exams / "main" / f"{split}.jsonl", (_asked(chance) for _ in range(count)))
    files = "".join(f"      - {{split: {split}, path: main/{split}.jsonl}}\n" for split in ("train", "test"))
    (exams / "README.md").write_text(f"---\nconfigs:\n  - config_name: main\n    data_files:\n{files}---\n", "utf-8")
    articles = ({"text": text} for text in encyclopedia())
    _write(folder / "HuggingFaceFW" / "finewiki" / "train.jsonl", articles)


def encyclopedia() -> list[str]:
    """Articles of plain sentences, which a tiny model learns in seconds."""
    chance = random.Random(1)
    return [" ".join(_sentence(chance) for _ in range(6)) for _ in range(ARTICLES)]


def exercises() -> list[str]:
    """Questions with answers, as the script shows them to the model."""
    chance = random.Random(2)
    rows = (_trained(chance) for _ in range(TRAINED))
    return [f"Question: {row['query']} Think step by step.\nAnswer:{row['response']}" for row in rows]


def _sentence(chance: random.Random) -> str:
    return f"{chance.choice(NAMES)} had {chance.randint(1, 9)} {chance.choice(THINGS)} and lived by the river."


def _sum(chance: random.Random) -> tuple[str, str, int]:
    """A question, its solution and the answer."""
    name, things = chance.choice(NAMES), chance.choice(THINGS)
    first, second = chance.randint(1, 9), chance.randint(1, 9)
    question = f"{name} has {first} {things} and gets {second}. How many {things} are there?"
    return question, f"{first} + {second} = {first + second} {things}.", first + second


def _trained(chance: random.Random) -> Row:
    question, solution, answer = _sum(chance)
    response = f"{solution}\nThe answer is: {answer}"
    return {"type": "GSM_Rephrased", "query": question, "original_question": question, "response": response}


def _asked(chance: random.Random) -> Row:
    question, solution, answer = _sum(chance)
    return {"question": question, "answer": f"{solution}\n#### {answer}"}


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
