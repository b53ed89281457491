"""Bases and adapters that all tests of the server read."""

from pathlib import Path

import pytest

from tests.recipes import tiny_models
from tests.serve.served import save_classifiers, save_language_adapters


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of letters."""
    return tiny_models.llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head."""
    return tiny_models.bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session")
def language_adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a0 to a5."""
    return save_language_adapters(llama, tmp_path_factory.mktemp("language"), 6)


@pytest.fixture(scope="session")
def classifiers(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with heads of 2, 3, 5 and 1 outputs."""
    return save_classifiers(bert, tmp_path_factory.mktemp("classifiers"))
