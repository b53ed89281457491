"""Inputs of the documentation's commands: python -m materials.files FOLDER

A CSV of movie reviews, new ones without a label, a play, and two models. They come inside packages of PyPI and Debian.
"""

import csv
import shutil
import sys
from pathlib import Path

from materials.data import movie_reviews, shakespeare
from materials.models import minilm, smollm2

REVIEWS, LINES, PLAY = 2000, 400, "lear"
NEW_REVIEWS = (
    "a fine, funny and touching film",
    "a dull story, badly told",
    "the actors do what they can with a script that does nothing",
)


def lay_out(folder: Path) -> None:
    """Write `reviews.csv`, `new.txt` and `play.txt`, and put `minilm` and `smollm2` beside them.

    Args:
        folder: empty.
    """
    task = movie_reviews()
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        labels = (task.classes[int(label)] for label in task.train.labels[:REVIEWS])
        rows.writerows(zip(task.train.texts[:REVIEWS], labels, strict=True))
    (folder / "new.txt").write_text("\n".join(NEW_REVIEWS) + "\n", encoding="utf-8")
    play = shakespeare().train[PLAY].splitlines()
    (folder / "play.txt").write_text("\n".join(play[:LINES]) + "\n", encoding="utf-8")
    # Copies, because commands would print the path that a link leads to.
    for name, model in (("minilm", minilm), ("smollm2", smollm2)):
        shutil.copytree(model(), folder / name)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    lay_out(Path(sys.argv[1]))
