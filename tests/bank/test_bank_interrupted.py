"""Ctrl-C at any line: a bank that was interrupted serves what it served before, or what it was to serve."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dvora
from tests.bank.tenants import HEADED, Served, Tenants, tenants
from tests.interrupted import interrupted_at as at_any_line
from tests.peft.tiny import outputs, same_bits

# A file that was opened and not yet handed on is closed by Python, which says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

MOST = 10**5
"""Lines that no call has."""
interrupted_at = partial(at_any_line, passing_over="with ")


@pytest.fixture(scope="module")
def these(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(HEADED, tmp_path_factory.mktemp("tenants"), 3)


def moments(request: pytest.FixtureRequest, call: Callable[[int], bool], step: int) -> Iterator[int]:
    """Until a call ends by itself; every one of its lines only at full length.

    Args:
        call: interrupted at a moment; whether it was.
        step: of a short run.
    """
    step = 1 if request.config.getoption("--fuzz") else step
    for moment in range(0, MOST, step):
        interrupted = call(moment)
        yield moment
        if not interrupted:
            return
    raise AssertionError("more lines than expected")


@pytest.fixture(scope="module")
def expected(these: Tenants) -> dict[str | None, Tensor]:
    with these.bank() as served:
        return {name: served([name] * 4) for name in (None, *these.names)}


def check_serves(bank: dvora.AdapterBank, model: torch.nn.Module, expected: dict[str | None, Tensor]) -> None:
    """Every name gives what some version of it gives, with all slots."""
    stats = bank.stats()
    assert stats.slots_in_use == 0
    served = Served(model, bank)
    for name in (None, *bank):
        found = served([name] * 4)
        assert any(torch.equal(found, each) for each in expected.values()), name
    assert same_bits(served([None] * 4), expected[None])
    if len(set(map(bank.digest, bank))) >= stats.slots > stats.pinned == 0:
        assert bank.stats().slots_filled == stats.slots


def test_batches(these: Tenants, expected: dict[str | None, Tensor], request: pytest.FixtureRequest) -> None:
    model = these.base()
    with dvora.AdapterBank(model, slots=2) as bank:
        bank.add_folder(these.folder)
        served = Served(model, bank)

        def run(moment: int) -> bool:
            # The oldest of two has to leave its slot, and the reading is repeated now and then.
            served(["a"] * 4), served(["b"] * 4)
            return interrupted_at(moment, lambda: served(["c", "b", None, "c"]))

        for _ in moments(request, run, 7):
            check_serves(bank, model, expected)


CHANGES: dict[str, Callable[[dvora.AdapterBank, Path], object]] = {
    "add": lambda bank, path: bank.add("new", path),
    "add pinned": lambda bank, path: bank.add("new", path, pinned=True),
    "replace": lambda bank, path: bank.replace("a", path),
    "remove": lambda bank, _: bank.remove("a"),
    "pin": lambda bank, _: bank.pin(["b"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str, these: Tenants, expected: dict[str | None, Tensor], request: pytest.FixtureRequest) -> None:
    model = these.base()
    with dvora.AdapterBank(model, slots=2, like=these.path("a")) as bank:

        def run(moment: int) -> bool:
            for each in list(bank):
                bank.remove(each)
            assert bank.stats().pinned == 0
            for each in ("a", "b"):
                bank.add(each, these.path(each))
            return interrupted_at(moment, lambda: CHANGES[name](bank, these.path("c")))

        for _ in moments(request, run, 23):
            assert {"b"} <= set(bank) <= {"a", "b", "new"}
            check_serves(bank, model, expected)


def test_the_first_adapter(these: Tenants, expected: dict[str | None, Tensor], request: pytest.FixtureRequest) -> None:
    found: list[tuple[dvora.AdapterBank, torch.nn.Module]] = []

    def run(moment: int) -> bool:
        model = these.base()
        found.append((dvora.AdapterBank(model), model))
        return interrupted_at(moment, lambda: found[-1][0].add("a", these.path("a")))

    for _ in moments(request, run, 173):
        bank, model = found[-1]
        if "a" in bank:
            check_serves(bank, model, expected)
        else:
            assert same_bits(outputs(model), outputs(these.base()))
            bank.add("a", these.path("a"))
        bank.close()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert same_bits(outputs(model), outputs(these.base()))


def test_closing(these: Tenants, request: pytest.FixtureRequest) -> None:
    found: list[tuple[dvora.AdapterBank, torch.nn.Module]] = []

    def run(moment: int) -> bool:
        model = these.base()
        found.append((dvora.AdapterBank(model, like=these.path("a")), model))
        return interrupted_at(moment, found[-1][0].close)

    for _ in moments(request, run, 3):
        bank, model = found[-1]
        bank.close()
        assert same_bits(outputs(model), outputs(these.base()))
