"""Adapters are added, replaced, removed, pinned and prefetched while batches run in other threads."""

import gc
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dvora
from tests.bank.tenants import HEADED, LLAMA, MLP, tenants
from tests.bank.versions import PATIENCE, Names, Versions, in_threads, until
from tests.peft.kinds import saved
from tests.peft.tiny import MODELS, inputs, same_bits

X = inputs(MODELS["mlp"](), 1)["x"][0]
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 30, 31, 32, 33], [21, 20, 19, 18, 17]])
"""Some with padding on the left."""
LONG = 1200.0
"""Seconds until a test at its full length counts as stuck."""
HAS_TOKEN = (PROMPTS != 0).long()


@torch.no_grad()
def of_x(model: nn.Module) -> Tensor:
    return model(X.double()[None])[0]


@pytest.fixture(scope="module")
def versions() -> Versions[Tensor]:
    """Of an adapter with a head, with the outputs for X."""
    return Versions(HEADED, 12, of_x)


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return saved(HEADED.trained(), tmp_path / "first")


def is_one_of(row: Tensor, possible: list[Tensor]) -> bool:
    return min(float((row.double() - each).abs().max()) for each in possible) < 2e-5


def test_versions_differ(versions: Versions[Tensor]) -> None:
    every = [versions.base, *versions.expected]
    distances = [float((a - b).abs().max()) for i, a in enumerate(every) for b in every[:i]]
    assert min(distances) > 1e-3


@pytest.mark.usefixtures("hasty_threads")
@pytest.mark.parametrize("host_rows", [1, 100], ids=["a host tier of one adapter", "of many"])
def test_rows_are_the_version_that_they_began_with(
    host_rows: int, versions: Versions[Tensor], first: Path, request: pytest.FixtureRequest
) -> None:
    rounds = 1500 if request.config.getoption("--fuzz") else 80
    model = HEADED.base().requires_grad_(False)
    one = 4 * (2 * (2 * 24 + 4) + 6 * 24)
    with dvora.AdapterBank(model, slots=5, host_bytes=one * host_rows, like=first) as bank:
        names = Names(bank, versions)
        for number in range(7):
            names.add(f"n{number}", number)
        wrong, stop = list[object](), threading.Event()

        def serve(seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(rounds):
                batch = [rng.choice([None, *names.begun]) for _ in range(4)]
                before = names.before(batch)
                with torch.no_grad(), bank.rows(batch):
                    possible = names.possible(batch, before)
                    found = model(X.expand(4, -1))
                    again = model(X.expand(4, -1))
                if not torch.equal(found, again):
                    wrong.append((batch, "changed within a batch"))
                wrong.extend(
                    (name, row)
                    for name, row, each in zip(batch, found, possible, strict=True)
                    if not is_one_of(row, each)
                )

        def change() -> None:
            rng = random.Random(10)
            while not stop.is_set():
                names.replace(rng.choice(list(names.begun)), rng.randrange(12))

        def disturb() -> None:
            rng = random.Random(11)
            while not stop.is_set():
                bank.add("other", versions.vectors[rng.randrange(12)])
                bank.pin(["other"])
                bank.prefetch([rng.choice(list(names.begun)), "other"]).result()
                bank.stats()
                bank.unpin(["other"])
                bank.remove("other")

        def readers() -> None:
            try:
                in_threads(*(lambda seed=seed: serve(seed) for seed in range(3)), patience=LONG)
            finally:
                stop.set()

        in_threads(readers, change, disturb, patience=LONG)
        assert not wrong
        stats = bank.stats()
        assert (stats.slots_in_use, stats.pinned, stats.adapters) == (0, 0, 7)
        assert stats.evictions > 0
        assert stats.host_bytes <= one * host_rows


def greedy(model: nn.Module) -> list[list[int]]:
    return tokens(model)


@torch.no_grad()
def tokens(model: nn.Module, prompts: Tensor | None = None) -> list[list[int]]:
    """What comes after each prompt, by greedy decoding."""
    which = torch.arange(len(PROMPTS)) if prompts is None else prompts
    found = model.generate(
        input_ids=PROMPTS[which], attention_mask=HAS_TOKEN[which], max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    return found[:, PROMPTS.shape[1] :].tolist()


def test_no_greedy_request_is_wrong_while_adapters_are_replaced(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    requests = 10_000 if request.config.getoption("--fuzz") else 192
    kind = LLAMA._replace(base=lambda: MODELS["llama"]().double())
    versions = Versions(LLAMA, 10, greedy)
    assert len({str(each) for each in [versions.base, *versions.expected]}) > 8
    model = kind.base().requires_grad_(False)
    with dvora.AdapterBank(model, slots=9, like=saved(LLAMA.trained(), tmp_path / "first")) as bank:
        names = Names(bank, versions)
        for number in range(12):
            names.add(f"n{number}", number % 10)
        wrong, stop, done = list[object](), threading.Event(), [0, 0]

        def serve(seed: int) -> None:
            rng = random.Random(seed)
            while done[seed] < requests // 2:
                batch = [rng.choice([None, *names.begun]) for _ in range(8)]
                prompts = torch.tensor([rng.randrange(len(PROMPTS)) for _ in batch])
                before = names.before(batch)
                with bank.rows(batch):
                    possible = names.possible(batch, before)
                    found = tokens(model, prompts)
                every = zip(batch, found, prompts.tolist(), possible, strict=True)
                wrong.extend((name, row) for name, row, prompt, of in every if row not in [each[prompt] for each in of])
                done[seed] += len(batch)

        def change() -> None:
            rng = random.Random(10)
            while not stop.wait(0.002):
                names.replace(rng.choice(list(names.begun)), rng.randrange(10))

        def readers() -> None:
            try:
                in_threads(lambda: serve(0), lambda: serve(1), patience=LONG)
            finally:
                stop.set()

        in_threads(readers, change, patience=LONG)
        assert not wrong
        assert sum(names.ended.values()) > 5


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[nn.Module, dvora.AdapterBank]]:
    """Six adapters, two slots."""
    these = tenants(MLP, tmp_path, 6)
    model = these.base()
    with dvora.AdapterBank(model, slots=2) as bank:
        bank.add_folder(tmp_path)
        yield model, bank


def test_batches_wait_for_each_other_s_slots(served: tuple[nn.Module, dvora.AdapterBank]) -> None:
    _model, bank = served
    entered, leave, second = threading.Event(), threading.Event(), threading.Event()

    def holds() -> None:
        with bank.rows(["a", "b"]):
            entered.set()
            leave.wait()

    def waits() -> None:
        entered.wait()
        with bank.rows(["c", "a"]):
            second.set()

    def watches() -> None:
        entered.wait()
        with bank.rows([None, None]), torch.no_grad():
            pass
        until(lambda: bank.stats().host_adapters == 3)
        assert not second.wait(0.05)
        leave.set()

    in_threads(holds, waits, watches)
    assert second.is_set()


def test_a_name_that_is_removed_ends_with_its_batch(served: tuple[nn.Module, dvora.AdapterBank]) -> None:
    model, bank = served
    with bank.rows(["a"] * 4), torch.no_grad():
        before = model(X.expand(4, -1))
        in_threads(lambda: bank.remove("a"))
        assert same_bits(model(X.expand(4, -1)), before)
        assert bank.stats().slots_in_use == 1
    with pytest.raises(ValueError, match="there is no adapter 'a'"), bank.rows(["a"]):
        pass


def test_prefetched_adapters_need_no_read_and_no_load(served: tuple[nn.Module, dvora.AdapterBank]) -> None:
    _, bank = served
    with bank.rows(["a"]):
        bank.prefetch(["b", "c"]).result()
        before = bank.stats()
        assert (before.reads, before.slots_filled, before.evictions) == (3, 2, 1)
    with bank.rows(["a", "c"]):
        assert bank.stats()[:8] == before._replace(slots_in_use=2)[:8]
        # What all slots are held for stays out of them, and is read.
        bank.prefetch(["d"]).result()
        assert bank.stats().evictions == 1
        assert bank.stats().host_adapters == 4


def test_what_is_pinned_while_a_batch_waits_for_slots_ends_its_waiting(
    served: tuple[nn.Module, dvora.AdapterBank],
) -> None:
    _, bank = served
    entered, leave = threading.Event(), threading.Event()

    def holds() -> None:
        with bank.rows(["a", "b"]):
            entered.set()
            leave.wait()

    def waits() -> str:
        entered.wait()
        try:
            with bank.rows(["c", "d"]):
                return "served"
        except ValueError as error:
            return str(error)

    def pins() -> None:
        until(lambda: bank.stats().host_adapters == 4)
        bank.pin(["e"])
        leave.set()

    found = in_threads(holds, waits, pins)
    assert "1 of them pinned for others" in found[1]
    with bank.rows(["e", "a"]):
        assert bank.stats().slots_in_use == 2


def test_a_pin_within_a_batch_does_not_wait_for_it(served: tuple[nn.Module, dvora.AdapterBank]) -> None:
    _, bank = served
    with bank.rows(["a", "b"]):
        in_threads(lambda: bank.pin(["c"]))
        bank.unpin(["c"])
        bank.pin(["d"])
    with bank.rows(["d"]):
        loads = bank.stats().loads
    for name in ("a", "b", "c"):
        with bank.rows([name]):
            pass
    with bank.rows(["d"]):
        assert bank.stats().loads == loads + 3


def test_a_bank_is_not_closed_while_batches_run(served: tuple[nn.Module, dvora.AdapterBank]) -> None:
    model, bank = served
    for names in (["a", "b"], [None, None]):
        entered, leave = threading.Event(), threading.Event()

        def holds(
            names: list[str | None] = names, entered: threading.Event = entered, leave: threading.Event = leave
        ) -> Tensor:
            with bank.rows(names), torch.no_grad():
                entered.set()
                leave.wait()
                return model(X.expand(2, -1))

        def closes(entered: threading.Event = entered, leave: threading.Event = leave) -> None:
            entered.wait()
            try:
                with pytest.raises(ValueError, match="1 batches are in the bank, which would"):
                    bank.close()
            finally:
                leave.set()

        assert in_threads(holds, closes)[0].isfinite().all()
    with bank.rows(["a", "b"]), torch.no_grad():
        model(X.expand(2, -1))


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

            in_threads(refused, *(lambda n=n, bank=bank: bank.add(n, these.path(n)) for n in these.names), refused)
            assert sorted(bank) == these.names
            assert sum(len(module._forward_hooks) for module in model.modules()) == 3 + 2
            with bank.rows(these.names), torch.no_grad():
                model(X.expand(4, -1))


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
        before = run(500 if is_long else 60)
        after = run(1500 if is_long else 60)
        assert after[0] == before[0]
        assert not is_long or after[1] - before[1] < 8e6
        stats = bank.stats()
        assert (stats.host_adapters, stats.slots_filled, stats.adapters) == (5, 3, 5)
