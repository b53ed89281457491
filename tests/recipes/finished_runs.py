"""Small models and finished runs of every task, each made once in a process and copied for those who ask for it."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from dvora.recipes.run_folder import Run, read_run
from dvora.recipes.settings import Settings
from dvora.recipes.training.run import train
from tests.recipes import tiny_data, tiny_models

DATA: dict[str, tuple[str, str, Callable[[Path], Path]]] = {
    "text-classification": ("bert", "reviews.csv", tiny_data.reviews),
    "regression": ("bert", "ratings.csv", tiny_data.ratings),
    "sentence-pairs": ("bert", "pairs.csv", tiny_data.pairs),
    "token-classification": ("bert", "entities.jsonl", tiny_data.entities),
    "image-classification": ("vit", "images", tiny_data.images),
    "causal-lm": ("llama", "play.txt", tiny_data.play),
}


def settings_of(task: str, model: Path | str = "m", **changes: Any) -> Settings:
    """Settings with data that is not there."""
    return Settings.model_validate({"task": task, "model": str(model), "data": "x", "cpu": True, **changes})


@cache
def all_models() -> dict[str, Path]:
    """Folders by name."""
    folder = _new_folder()
    makers = (tiny_models.bert, tiny_models.llama, tiny_models.vit)
    return {make.__name__: make(folder / make.__name__) for make in makers}


def finished(task: str, folder: Path, **settings: Any) -> Run:
    """A run of an epoch, in the folder "run"; its data lies beside it."""
    made = _trained(task, tuple(sorted(settings.items())))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    for name in ("run.json", "config.yaml"):
        file = folder / "run" / name
        file.write_text(file.read_text(encoding="utf-8").replace(str(made), str(folder)), encoding="utf-8")
    return read_run(folder / "run")


@cache
def _trained(task: str, settings: tuple[tuple[str, Any], ...]) -> Path:
    """A folder with data, and a run of it."""
    folder = _new_folder()
    base, name, write = DATA[task]
    given = {
        "task": task,
        "model": str(all_models()[base]),
        "data": str(write(folder / name)),
        "output": str(folder / "run"),
        "rank": 4,
        "epochs": 1,
        "learning_rate": 0.03,
        "max_length": 24,
        "cpu": True,
        "if_no_better": "adapter",
        **dict(settings),
    }
    if given.get("method") in ("full", "head"):
        del given["rank"]
    assert train(Settings.model_validate(given)).run
    return folder


def _new_folder() -> Path:
    """Removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="dvora-tests-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
