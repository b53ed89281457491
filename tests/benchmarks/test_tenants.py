"""A classifier for each tenant: parts that do not overlap, and a bank that trains as one by one."""

from collections.abc import Iterator

import pytest

from benchmarks.quality.grid import Rates, Run
from benchmarks.tenants import sources, times, training
from benchmarks.tenants.sources import KINDS, ROWS, tenants
from benchmarks.tenants.table import LABELS
from benchmarks.tenants.training import ARMS, IN_BANK, TASK, carry_out, grid_of_tenants
from materials.data import WORDNET
from materials.fetch import UnavailableError, fetch
from materials.many_classes import WEBSTER
from materials.splits import same_text

pytestmark = pytest.mark.usefixtures("products_in_bfloat16")
ROUNDING = 5e-3
"""Of a loss in bfloat16."""


@pytest.fixture(scope="module")
def dictionaries() -> None:
    """WordNet's and Webster's, which come as packages of Debian."""
    try:
        fetch(WORDNET)
        fetch(WEBSTER)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def two_tenants(dictionaries: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They have five classes and three, and fewer rows."""
    monkeypatch.setattr(sources, "ROWS", 300)
    monkeypatch.setattr(training, "KINDS", {"countries": 1, "kinds": 1})
    monkeypatch.setattr(training, "TUNED_ON", 1)
    training.all_tenants.cache_clear()
    yield
    training.all_tenants.cache_clear()


@pytest.mark.usefixtures("dictionaries")
def test_every_tenant_has_classes_of_its_own_and_no_text_in_two_parts() -> None:
    every = tenants()
    assert len(every) == sum(KINDS.values()) == len({task.classes for task in every})
    for task in every:
        texts = [same_text(text) for part in (task.train, task.validation, task.test) for text in part.texts]
        assert len(set(texts)) == len(texts), task.name
        assert 100 <= len(texts) <= ROWS, task.name
        assert set(task.train.labels) == set(range(len(task.classes))), task.name


def test_every_arm_has_a_line_of_the_table_and_rates_to_try() -> None:
    assert set(ARMS) <= set(LABELS)
    trials = [run.arm for run in grid_of_tenants().waiting({}, [TASK], ARMS) if run.stage == "trial"]
    assert {arm: trials.count(arm) for arm in ARMS} == {arm: 0 if arm == "frozen" else 3 for arm in ARMS}


@pytest.mark.usefixtures("two_tenants")
def test_a_bank_trains_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(TASK, IN_BANK[0], "final", 0, 3, Rates(0.005, 0.005, 0.005))
    together = carry_out(run)
    monkeypatch.setattr(training, "IN_BANK", ())
    alone = carry_out(run)
    assert 0 < alone["smallest_bytes"] < alone["saved_bytes"]
    assert together["test"]["loss"] == pytest.approx(alone["test"]["loss"], abs=ROUNDING)
    assert [*together["scores"].values()] == pytest.approx([*alone["scores"].values()], abs=0.02)


@pytest.mark.usefixtures("two_tenants")
def test_every_arm_is_timed_in_turns() -> None:
    rows = times.timed(training.all_tenants(2), rounds=1)
    assert [made["arm"] for made in rows] == times.TIMED
    assert all(low <= middle <= high for made in rows for low, middle, high in (made["training"], made["serving"]))
