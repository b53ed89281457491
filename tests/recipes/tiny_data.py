"""Small data of every task, written into a folder."""

import csv
import json
import random
from pathlib import Path

from PIL import Image

FILLERS = ["a", "the", "movie", "book", "was", "it", "is", "very"]
OPINIONS = {"good": ["good", "fine", "great"], "bad": ["bad", "poor", "awful"]}


def reviews(path: Path, count: int = 120) -> Path:
    """Different sentences whose first word determines whether they are good."""
    generator = random.Random(0)
    texts: dict[str, str] = {}
    while len(texts) < count:
        label = ["good", "bad"][len(texts) % 2]
        words = [generator.choice(OPINIONS[label]), *generator.choices(FILLERS, k=5)]
        texts[" ".join(words)] = label
    return _written(path, ["text", "label"], [list(row) for row in texts.items()])


def ratings(path: Path, count: int = 120) -> Path:
    """Sentences with a number: how many of the words are good."""
    generator = random.Random(0)
    texts = {" ".join(generator.choices([*OPINIONS["good"], *OPINIONS["bad"]], k=4)) for _ in range(3 * count)}
    rows = [[text, sum(word in OPINIONS["good"] for word in text.split()) / 4] for text in sorted(texts)[:count]]
    return _written(path, ["text", "rating"], rows)


def pairs(path: Path, count: int = 120) -> Path:
    """Two sentences each, and whether they say the same."""
    generator = random.Random(0)
    rows = []
    for number in range(count):
        first, second = (generator.choice(["good", "bad"]) for _ in range(2))
        sides = [
            f"{generator.choice(OPINIONS[side])} {' '.join(generator.choices(FILLERS, k=4))}"
            for side in (first, second)
        ]
        rows.append([*sides, "same" if first == second else "other", number])
    return _written(path, ["sentence1", "sentence2", "label", "id"], rows)


def entities(path: Path, count: int = 120) -> Path:
    """Sentences whose opinions, of one word or with "very", and things have labels."""
    generator = random.Random(0)
    lines: dict[str, str] = {}
    while len(lines) < count:
        text, found = "", []
        for _ in range(3):
            filler = generator.choice(["a", "the", "was", "it", "is"])
            label, phrase = generator.choice(
                [
                    ("OPINION", f"very {generator.choice(OPINIONS['good'])}"),
                    ("OPINION", "bad"),
                    ("THING", "movie"),
                    ("", ""),
                ]
            )
            text += f"{filler} "
            if label:
                found.append({"start": len(text), "end": len(text) + len(phrase), "label": label})
                text += f"{phrase} "
        lines[text] = json.dumps({"text": text, "entities": found})
    path.write_text("\n".join(lines.values()))
    return path


def play(path: Path) -> Path:
    """A text of paragraphs."""
    generator = random.Random(0)
    path.write_text("\n\n".join(" ".join(generator.choices(FILLERS, k=12)) for _ in range(150)))
    return path


def chats(path: Path, count: int = 40) -> Path:
    """Questions and answers."""
    lines = [
        {"messages": [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def images(folder: Path, count: int = 40) -> Path:
    """Dark and bright squares."""
    generator = random.Random(0)
    for number in range(count):
        name = ["dark", "bright"][number % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        low = 0 if name == "dark" else 150
        pixels = bytes(low + generator.randrange(100) for _ in range(64))
        Image.frombytes("L", (8, 8), pixels).save(folder / name / f"{number}.png")
    return folder


def _written(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path
