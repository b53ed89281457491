"""Adapters are added, replaced, removed and read while batches run in other threads."""

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dvora
from tests.bank.bank_machine import X, of_x
from tests.bank.tenants import HEADED, LLAMA, MLP, Served, tenants
from tests.bank.versions import PATIENCE, Names, Versions, in_threads
from tests.peft.kinds import saved
from tests.peft.tiny import MODELS

PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 30, 31, 32, 33], [21, 20, 19, 18, 17]])
"""Some with padding on the left."""
LONG = 1200.0
"""Seconds until a test at its full length counts as stuck."""


@pytest.fixture(scope="module")
def versions() -> Versions[Tensor]:
    """Of an adapter with a head, with the outputs for X."""
    return Versions(HEADED, 12, of_x)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return saved(HEADED.trained(), tmp_path / "first")


def wrong_rows(
    names: Names[Any], rounds: Sequence[int], rows_of: Callable[[random.Random, int, list[list[Any]]], Iterator[bool]]
) -> list[object]:
    """Rows that no version gives that their names had, of batches in a thread each while names change in another one.

    Args:
        names: of a bank, with versions.
        rounds: how many batches each thread has.
        rows_of: calls the model on a batch of so many rows; whether each is one of those that it may be.
    """
    wrong, stop = list[object](), threading.Event()

    def serve(seed: int, count: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            batch = [rng.choice([None, *names.begun]) for _ in range(4)]
            before = names.before(batch)
            with torch.no_grad(), names.bank.rows(batch):
                possible = names.possible(batch, before)
                right = rows_of(rng, len(batch), possible)
                wrong.extend(name for name, is_right in zip(batch, right, strict=True) if not is_right)

    def change() -> None:
        rng = random.Random(10)
        while not stop.wait(0.001):
            names.replace(rng.choice(list(names.begun)), rng.randrange(len(names.versions.vectors)))

    def disturb() -> None:
        bank, rng = names.bank, random.Random(11)
        while not stop.is_set():
            bank.add("other", rng.choice(names.versions.vectors))
            bank.digest("other")
            bank.stats()
            bank.remove("other")

    def readers() -> None:
        try:
            in_threads(*(partial(serve, seed, count) for seed, count in enumerate(rounds)), patience=LONG)
        finally:
            stop.set()

    in_threads(readers, change, disturb, patience=LONG)
    assert sum(names.ended.values()) > 5
    return wrong


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("host_rows", [1, 100], ids=["a host tier of one adapter", "of many"])
def test_rows_are_the_version_that_they_began_with(
    host_rows: int, versions: Versions[Tensor], first: Path, request: pytest.FixtureRequest
) -> None:
    rounds = 1500 if request.config.getoption("--fuzz") else 80
    model = HEADED.base().requires_grad_(False)
    one = 4 * (2 * (2 * 24 + 4) + 6 * 24)

    def rows_of(_: random.Random, count: int, possible: list[list[Tensor]]) -> Iterator[bool]:
        found, again = model(X.expand(count, -1)), model(X.expand(count, -1))
        assert torch.equal(found, again)
        for row, of_row in zip(found, possible, strict=True):
            yield min(float((row.double() - each).abs().max()) for each in of_row) < 2e-5

    with dvora.AdapterBank(model, slots=5, host_bytes=one * host_rows, like=first) as bank:
        names = Names(bank, versions)
        for number in range(7):
            names.add(f"n{number}", number)
        assert not wrong_rows(names, [rounds] * 3, rows_of)
        stats = bank.stats()
        assert (stats.slots_in_use, stats.adapters) == (0, 7)
        assert stats.evictions > 0
        assert stats.host_bytes <= one * host_rows


@torch.no_grad()
def tokens(model: nn.Module, prompts: Tensor = PROMPTS) -> list[list[int]]:
    """What comes after each prompt, by greedy decoding."""
    counts = {"max_new_tokens": 4, "min_new_tokens": 4}
    found = model.generate(input_ids=prompts, attention_mask=(prompts != 0).long(), do_sample=False, **counts)
    return found[:, PROMPTS.shape[1] :].tolist()


def test_no_greedy_request_is_wrong_while_adapters_are_replaced(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rounds = 1200 if request.config.getoption("--fuzz") else 24
    versions = Versions(LLAMA, 10, tokens)
    assert len({str(each) for each in [versions.base, *versions.expected]}) > 8
    model = MODELS["llama"]().double().requires_grad_(False)

    def rows_of(rng: random.Random, count: int, possible: list[list[Any]]) -> Iterator[bool]:
        which = [rng.randrange(len(PROMPTS)) for _ in range(count)]
        for row, prompt, of_row in zip(tokens(model, PROMPTS[which]), which, possible, strict=True):
            yield row in [each[prompt] for each in of_row]

    with dvora.AdapterBank(model, slots=9, like=saved(LLAMA.trained(), tmp_path / "first")) as bank:
        names = Names(bank, versions)
        for number in range(12):
            names.add(f"n{number}", number % 10)
        assert not wrong_rows(names, [rounds] * 2, rows_of)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Six adapters, two slots."""
    with tenants(MLP, tmp_path, 6).bank(slots=2) as served:
        yield served


@pytest.mark.parametrize("names", [["a", "b"], [None, None]], ids=["adapters", "the base"])
def test_a_bank_is_not_closed_while_batches_run_in_other_threads(names: list[str | None], served: Served) -> None:
    entered, leave = threading.Event(), threading.Event()

    def holds() -> Tensor:
        with served.bank.rows(names), torch.no_grad():
            entered.set()
            leave.wait()
            return served.model(X.expand(2, -1))

    def closes() -> None:
        entered.wait()
        try:
            with pytest.raises(ValueError, match="1 batches are in the bank, which would have the base's outputs"):
                served.bank.close()
        finally:
            leave.set()

    found, _ = in_threads(holds, closes)
    assert torch.equal(found, served(names, X.expand(2, -1)))


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


def test_passes_that_are_in_one_head_at_once_have_their_own_values(tmp_path: Path) -> None:
    these = tenants(HEADED._replace(base=with_a_meeting), tmp_path, 2)
    with these.bank() as served:
        alone = [served([name] * 4) for name in these.names]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meeting, "barrier", threading.Barrier(2))
            together = in_threads(*(lambda name=name: served([name] * 4) for name in these.names))
    assert all(map(torch.equal, together, alone))


def bytes_of_tensors() -> int:
    gc.collect()
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (Tensor, nn.Parameter) and each.device.type == "cpu"
    }
    return sum(storages.values())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat_over_a_long_run(
    versions: Versions[Tensor], first: Path, request: pytest.FixtureRequest
) -> None:
    is_long = request.config.getoption("--fuzz")
    model = HEADED.base().requires_grad_(False)
    with dvora.AdapterBank(model, slots=3, like=first) as bank:
        names = Names(bank, versions)
        for number in range(5):
            names.add(f"n{number}", number)

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
