"""Small finished runs of every task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dvora.recipes.run_folder import Run
from dvora.recipes.settings import Settings
from dvora.recipes.training.run import train
from tests.recipes import tiny_data

DATA: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "text-classification": ("bert", "reviews.csv", tiny_data.reviews),
    "regression": ("bert", "ratings.csv", tiny_data.ratings),
    "sentence-pairs": ("bert", "pairs.csv", tiny_data.pairs),
    "image-classification": ("vit", "images", tiny_data.images),
    "causal-lm": ("llama", "play.txt", tiny_data.play),
}


def finished(task: str, models: dict[str, Path], folder: Path, **settings: Any) -> Run:
    """A run of an epoch; its data lies beside it."""
    base, name, write = DATA[task]
    given = {
        "task": task,
        "model": str(models[base]),
        "data": str(write(folder / name)),
        "output": str(folder / "run"),
        "rank": 4,
        "epochs": 1,
        "learning_rate": 0.03,
        "max_length": 24,
        "cpu": True,
        **settings,
    }
    if given.get("method") in ("full", "head"):
        del given["rank"]
    run = train(Settings.model_validate(given)).run
    assert run is not None
    return run
