"""What the transcript starts from: a CSV of movie reviews, a play, and two models, in an otherwise empty folder."""

import csv
import shutil
from pathlib import Path

from benchmarks.data import movie_reviews, shakespeare
from benchmarks.models import minilm, smollm2

PLAY = "lear"
NEW_REVIEWS = (
    "a fine, funny and touching film",
    "two hours that I shall never get back",
    "the actors do what they can with a script that does nothing",
)


def lay_out(folder: Path, reviews: int, lines: int) -> None:
    """Write `reviews.csv`, `new.txt` and `play.txt`, and put `minilm` and `smollm2` beside them.

    Args:
        folder: empty.
        reviews: how many rows of the training part.
        lines: how many lines of the play.
    """
    task = movie_reviews()
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        labels = (task.classes[int(label)] for label in task.train.labels[:reviews])
        rows.writerows(zip(task.train.texts[:reviews], labels, strict=True))
    (folder / "new.txt").write_text("\n".join(NEW_REVIEWS) + "\n", encoding="utf-8")
    play = shakespeare().train[PLAY].splitlines()
    (folder / "play.txt").write_text("\n".join(play[:lines]) + "\n", encoding="utf-8")
    # Copies, for a link's own path would be told in what the commands show.
    for name, model in (("minilm", minilm), ("smollm2", smollm2)):
        shutil.copytree(model(), folder / name)
