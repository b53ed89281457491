"""Bases and adapters that all tests of the server read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes import tiny_models
from tests.serve.served import Serving, copied, save_classifiers, save_critics, serving


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head."""
    return tiny_models.bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session")
def critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head of its own, of three classes."""
    return tiny_models.classifier(tmp_path_factory.mktemp("bases") / "critic")


@pytest.fixture(scope="session")
def trained(critic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a0 to a5 of the critic, each with a head of three classes."""
    return save_critics(critic, tmp_path_factory.mktemp("trained"), 6)


@pytest.fixture(scope="session")
def classifiers(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters with heads of 2, 3, 5 and 1 outputs."""
    return save_classifiers(bert, tmp_path_factory.mktemp("classifiers"))


@pytest.fixture
def adapters(trained: Path, tmp_path: Path) -> Path:
    """Those of the critic, which a test may change."""
    return copied(trained, tmp_path / "adapters")


@pytest.fixture(scope="session")
def critics(critic: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of the critic, whose adapters no test changes."""
    with serving(critic, copied(trained, tmp_path_factory.mktemp("critics") / "adapters")) as pair:
        yield pair


@pytest.fixture(scope="session")
def judges(bert: Path, classifiers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of the encoder, whose adapters no test changes."""
    with serving(bert, copied(classifiers, tmp_path_factory.mktemp("judges") / "adapters")) as pair:
        yield pair
