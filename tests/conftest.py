"""Settings of the whole suite."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import dvora

# Sums over several threads depend on their number, and small tensors are faster on one.
torch.set_num_threads(1)

settings.register_profile("default", deadline=None, max_examples=30)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def no_default_projections() -> Iterator[None]:
    """Every test starts and ends without the process-wide default projections."""
    dvora.reset_shared_matrices()
    yield
    dvora.reset_shared_matrices()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="run the randomised tests at their full length")
