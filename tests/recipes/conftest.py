"""Tiny models for the tests of recipes."""

from pathlib import Path

import pytest

from tests.recipes.finished_runs import all_models


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    """Folders by name."""
    return all_models()


@pytest.fixture(scope="session")
def bert() -> Path:
    """A base without a head."""
    return all_models()["bert"]
