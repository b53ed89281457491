"""Adapters are added, replaced, removed and read while batches run in other threads."""

import gc
import os
import random
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dvora
from tests.bank.tenants import HEADED, MLP, Served, tenants
from tests.bank.versions import PATIENCE, Versions, X, in_threads
from tests.peft.kinds import saved
from tests.peft.tiny import MODELS

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
def test_first_adapters_may_come_from_several_threads(tmp_path: Path) -> None:
    these = tenants(MLP, tmp_path / "good", 4)
    saved(MLP.fresh(), tmp_path / "bad")
    for _ in range(5):
        model = these.base()
        with dvora.AdapterBank(model) as bank:

            def refused(bank: dvora.AdapterBank = bank) -> None:
                with pytest.raises(ValueError, match="it changes nothing"):
                    bank.add("bad", tmp_path / "bad")

            in_threads(refused, *(partial(bank.add, name, these.path(name)) for name in these.names), refused)
            assert sorted(bank) == these.names
            assert sum(len(module._forward_hooks) for module in model.modules()) == 3 + 2
            assert Served(model, bank)(these.names).isfinite().all()


class Meeting(nn.Linear):
    """A head in which the passes of two threads meet."""

    barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        if Meeting.barrier is not None:
            Meeting.barrier.wait(PATIENCE)
        return super().forward(x)


def with_a_meeting() -> nn.Module:
    model = MODELS["mlp"]()
    head = Meeting(24, 6, bias=False)
    head.load_state_dict(model.lin2.state_dict())
    model.lin2 = head
    return model


def test_passes_that_are_in_one_head_at_once_have_their_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    these = tenants(HEADED._replace(base=with_a_meeting), tmp_path, 2)
    with these.bank() as served:
        alone = [served([name] * 4) for name in these.names]
        monkeypatch.setattr(Meeting, "barrier", threading.Barrier(2))
        together = in_threads(*(partial(served, [name] * 4) for name in these.names))
    assert all(map(torch.equal, together, alone))


def bytes_of_tensors() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"]
    # What `vmap` hands to a head has no storage; an error that somebody holds may hold one.
    stored = [each for each in tensors if not torch._C._functorch.is_batchedtensor(each)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in stored}.values())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_a_long_run(versions: Versions, first: Path, request: pytest.FixtureRequest) -> None:
    is_long = request.config.getoption("--fuzz")
    model = HEADED.base().requires_grad_(False)
    with dvora.AdapterBank(model, slots=3, like=first) as bank:
        for number in range(5):
            bank.add(f"n{number}", versions.vectors[number])

        def run(rounds: int) -> tuple[int, int]:
            for number in range(rounds):
                bank.replace(f"n{number % 5}", versions.vectors[number % 12] + number / 1000)
                bank.add("new", versions.vectors[number % 12] - number / 1000)
                with torch.no_grad(), bank.rows([f"n{(number + 1) % 5}", f"n{number % 5}", "new", None]):
                    model(X.expand(4, -1))
                bank.remove("new")
            return bytes_of_tensors(), resident_bytes()

        run(20)
        before, after = run(500 if is_long else 60), run(1500 if is_long else 60)
        assert after[0] == before[0]
        assert not is_long or after[1] - before[1] < 8e6
        stats = bank.stats()
        assert (stats.host_adapters, stats.slots_filled, stats.adapters) == (5, 3, 5)
