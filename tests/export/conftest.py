"""The base that tests of exports read."""

from pathlib import Path

import pytest

from tests.recipes import tiny_models


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head, of one layer: PyTorch takes its time to trace one."""
    return tiny_models.bert(tmp_path_factory.mktemp("bases") / "bert", layers=1)
