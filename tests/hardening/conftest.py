"""A desk with tiny models, adapters and data, and a warm process that runs commands there."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hardening.forks import Forks
from tests.recipes import tiny_data, tiny_models
from tests.recipes.saved_adapters import save


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    warm = Forks(tmp_path_factory.mktemp("forks"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = tiny_models.bert(folder / "base")
    tiny_models.llama(folder / "language")
    save(base, folder / "adapter")
    tiny_data.reviews(folder / "reviews.csv")
    return folder


@pytest.fixture
def desk(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "desk"))
