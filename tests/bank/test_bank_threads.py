"""Adapters are added, replaced, removed and read while batches run in other threads."""

import random
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import dvora
from tests.bank.tenants import HEADED, MLP, Served, tenants
from tests.bank.versions import Versions, X, in_threads
from tests.peft.kinds import saved

ONE = 4 * (2 * (2 * 24 + 4) + 6 * 24)
"""Bytes of an adapter with a head."""
LONG = 1200.0
"""Seconds until a test at its full length counts as stuck."""


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions(12)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return saved(HEADED.trained(), tmp_path / "first")


@pytest.mark.usefixtures("hasty_threads")
def test_rows_are_the_version_that_they_began_with(
    versions: Versions, first: Path, request: pytest.FixtureRequest
) -> None:
    rounds = 3000 if request.config.getoption("--fuzz") else 120
    model, stop, wrong = HEADED.base().requires_grad_(False), threading.Event(), list[str | None]()
    bank = dvora.AdapterBank(model, slots=5, host_bytes=ONE, like=first)
    # Versions of each name, from before a change began, and how many of its changes have ended.
    begun = {f"n{number}": [number] for number in range(7)}
    ended = dict.fromkeys(begun, 0)
    for name, (version,) in begun.items():
        bank.add(name, versions.vectors[version])

    @torch.no_grad()
    def serve(seed: int) -> None:
        drawn = random.Random(seed)
        for _ in range(rounds):
            batch = [drawn.choice([None, *begun]) for _ in range(4)]
            first = {name: ended.get(name, 0) for name in batch}
            with bank.rows(batch):
                possible = {name: begun[name][first[name] :] for name in batch if name is not None}
                found, again = model(X.expand(4, -1)), model(X.expand(4, -1))
            assert torch.equal(found, again)
            for name, row in zip(batch, found, strict=True):
                right = [versions.base] if name is None else [versions.expected[number] for number in possible[name]]
                if min(float((row.double() - each).abs().max()) for each in right) > 2e-5:
                    wrong.append(name)

    def change() -> None:
        drawn = random.Random(10)
        while not stop.wait(0.001):
            name, version = drawn.choice(list(begun)), drawn.randrange(len(versions.vectors))
            begun[name].append(version)
            bank.replace(name, versions.vectors[version])
            ended[name] += 1

    def disturb() -> None:
        drawn = random.Random(11)
        while not stop.is_set():
            bank.add("other", drawn.choice(versions.vectors))
            bank.digest("other")
            bank.stats()
            bank.remove("other")

    def readers() -> None:
        try:
            in_threads(*(partial(serve, seed) for seed in range(3)), patience=LONG)
        finally:
            stop.set()

    in_threads(readers, change, disturb, patience=LONG)
    assert not wrong
    assert sum(ended.values()) > 5
    stats = bank.stats()
    assert (stats.slots_in_use, stats.adapters) == (0, 7)
    assert stats.evictions > 0
    assert stats.host_bytes <= ONE
    bank.close()


@pytest.mark.usefixtures("hasty_threads")
def test_adapters_may_come_from_several_threads(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path, 4)
    for _ in range(5):
        model = these.base()
        with dvora.AdapterBank(model, like=these.path("a")) as bank:
            in_threads(*(partial(bank.add, name, these.path(name)) for name in these.names))
            assert sorted(bank) == these.names
            assert sum(len(module._forward_hooks) for module in model.modules()) == 3 + 3 + 1
            assert Served(model, bank)(these.names).isfinite().all()
