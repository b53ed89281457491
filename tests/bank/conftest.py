"""A small bank that must serve as before at the end of a test: what tests of refusals share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.bank.refusals import NAMES
from tests.bank.tenants import HEADED, Served, Tenants, tenants


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heads of the base are meant here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:rows of None get the model's own"))


@pytest.fixture(scope="module")
def these(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(HEADED, tmp_path_factory.mktemp("tenants"))


@pytest.fixture
def served(these: Tenants) -> Iterator[Served]:
    """A bank with three adapters of which one was read, and that serves as before at the end."""
    with these.bank(slots=2) as served:
        before = served(NAMES)
        held = list(served.bank)
        yield served
        assert list(served.bank) == held
        assert served.bank.stats().slots_in_use == 0
        assert torch.equal(served(NAMES), before)
