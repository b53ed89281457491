"""Tiny models for the tests of recipes, made once."""

from pathlib import Path

import pytest

from tests.recipes import tiny_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by name."""
    folder = tmp_path_factory.mktemp("models")
    return {
        make.__name__: make(folder / make.__name__) for make in (tiny_models.bert, tiny_models.llama, tiny_models.vit)
    }
