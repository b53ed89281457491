"""Whose batch a call is in: nobody gets the adapters of somebody else's rows, whatever runs where."""

import asyncio
import copy
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from contextvars import copy_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dvora
from tests.bank.tenants import MLP, Served, Tenants, tenants
from tests.bank.trained import Alone, Together, batch_of, check_gradients, row_losses, save_all, together
from tests.peft.kinds import GROUPS, Kind
from tests.peft.models_compared import worst_difference
from tests.peft.tiny import MODELS, inputs

ELSEWHERE = r"from another thread, task or generator than the one that entered"
OUTSIDE = r"called outside of bank\.rows"


@pytest.fixture(scope="module")
def these(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return tenants(MLP, tmp_path_factory.mktemp("tenants"), 2)


@pytest.fixture
def served(these: Tenants) -> Iterator[Served]:
    with these.bank() as served:
        yield served


@pytest.fixture
def x(these: Tenants) -> Tensor:
    return inputs(these.base(), 1)["x"]


@pytest.fixture
def expected(served: Served, x: Tensor) -> dict[str, Tensor]:
    found = {name: served([name], x) for name in ("a", "b")}
    assert not torch.allclose(found["a"], found["b"])
    return found


class Thread:
    """A thread that runs one call after another."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, call: Callable[[], object]) -> object:
        return self._pool.submit(torch.no_grad()(call)).result(30)


def steps(served: Served, name: str, x: Tensor) -> Iterator[Tensor]:
    """A request whose answer is streamed: two steps in one batch."""
    with served.bank.rows([name]):
        yield served.model(x)
        yield served.model(x)


# Whose batch it is


def test_generators_whose_steps_change_threads_get_their_own_adapter_or_an_error(
    served: Served, x: Tensor, expected: dict[str, Tensor]
) -> None:
    first, second = Thread(), Thread()
    of_a, of_b = steps(served, "a", x), steps(served, "b", x)
    assert torch.equal(first(lambda: next(of_a)), expected["a"])
    assert torch.equal(second(lambda: next(of_b)), expected["b"])
    # Each in the other's thread, where the other's batch is.
    with pytest.raises(ValueError, match=ELSEWHERE):
        second(lambda: next(of_a))
    with pytest.raises(ValueError, match=OUTSIDE):
        first(lambda: next(of_b))
    # Their batches ended in other threads than they began in; neither thread stays in them.
    for thread in (first, second):
        with pytest.raises(ValueError, match=OUTSIDE):
            thread(lambda: served.model(x))
        assert torch.equal(thread(lambda: served(["b"], x)), expected["b"])
    assert served.bank.stats().slots_in_use == 0


def test_a_generator_that_stays_in_its_thread_is_served_between_other_batches(
    served: Served, x: Tensor, expected: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        of_a = steps(served, "a", x)
        assert torch.equal(next(of_a), expected["a"])
        # It has stopped in its batch, which serves nobody else.
        with pytest.raises(ValueError, match=ELSEWHERE):
            served.model(x)
        assert torch.equal(served(["b"], x), expected["b"])
        with served.bank.rows(["b"]):
            with pytest.raises(ValueError, match="in two batches of the bank"):
                next(of_a)
            assert torch.equal(served.model(x), expected["b"])


def test_helpers_that_enter_a_batch_for_their_caller_work(
    served: Served, x: Tensor, expected: dict[str, Tensor]
) -> None:
    @contextmanager
    def of(name: str) -> Iterator[None]:
        with served.bank.rows([name]):
            yield

    @asynccontextmanager
    async def of_task(name: str) -> AsyncIterator[None]:
        with served.bank.rows([name]):
            yield

    async def task() -> Tensor:
        async with of_task("b"):
            return served.model(x)

    with torch.no_grad():
        with of("a"):
            assert torch.equal(served.model(x), expected["a"])
        with ExitStack() as stack:
            stack.enter_context(served.bank.rows(["b"]))
            assert torch.equal(served.model(x), expected["b"])
        assert torch.equal(asyncio.run(task()), expected["b"])


def test_asyncio_tasks_have_their_own_batches_and_one_without_is_refused(
    served: Served, x: Tensor, expected: dict[str, Tensor]
) -> None:
    async def request(name: str, turns: int) -> list[Tensor]:
        found = []
        with served.bank.rows([name]):
            for _ in range(turns):
                found.append(served.model(x))
                await asyncio.sleep(0)
        return found

    async def without() -> None:
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match=OUTSIDE):
            served.model(x)

    async def inherits() -> None:
        # A task that a batch starts has a copy of its context, and named no rows.
        with served.bank.rows(["a"]):
            with pytest.raises(ValueError, match=ELSEWHERE):
                await asyncio.create_task(runs())
            with pytest.raises(ValueError, match=ELSEWHERE):
                await asyncio.to_thread(served.model, x)

    async def runs() -> None:
        served.model(x)

    async def main() -> None:
        a, b, _ = await asyncio.gather(request("a", 3), request("b", 3), without())
        assert all(torch.equal(each, expected["a"]) for each in a)
        assert all(torch.equal(each, expected["b"]) for each in b)
        await inherits()

    with torch.no_grad():
        asyncio.run(main())


def test_another_thread_is_not_in_the_batch(served: Served, x: Tensor) -> None:
    other = Thread()
    with served.bank.rows(["a"]):
        with pytest.raises(ValueError, match=OUTSIDE):
            other(lambda: served.model(x))
        # Not with this thread's context either.
        context = copy_context()
        with pytest.raises(ValueError, match=ELSEWHERE):
            other(lambda: context.run(served.model, x))


def test_two_batches_of_one_thread_never_wait_for_each_other(these: Tenants, x: Tensor) -> None:
    async def first(served: Served, ready: asyncio.Event) -> None:
        with served.bank.rows(["a"]):
            ready.set()
            await asyncio.sleep(0.01)

    async def second(served: Served, ready: asyncio.Event) -> None:
        await ready.wait()
        with pytest.raises(ValueError, match="no room for another one"), served.bank.rows(["b"]):
            pass

    async def main(served: Served) -> None:
        ready = asyncio.Event()
        await asyncio.gather(first(served, ready), second(served, ready))

    with these.bank(slots=1) as served:
        asyncio.run(main(served))
        assert served.bank.stats().slots_in_use == 0


# What the hooks do


def test_hooks_that_were_there_see_the_outputs_of_the_adapters(these: Tenants, x: Tensor) -> None:
    model, seen = these.base(), list[Tensor]()
    model.lin1.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with dvora.AdapterBank(model, like=these.path("a")) as bank:
        bank.add_folder(these.folder)
        with torch.no_grad(), bank.rows(["a"]):
            model(x)
    alone, of_alone = these.alone("a").float(), list[Tensor]()
    alone.lin1.register_forward_hook(lambda _module, _args, output: of_alone.append(output))
    with torch.no_grad():
        alone(x)
    assert worst_difference(seen[0], of_alone[0]) < 1e-5


def test_a_served_model_is_not_copied_or_saved_as_a_whole(served: Served, tmp_path: Path) -> None:
    for call in (lambda: copy.deepcopy(served.model), lambda: torch.save(served.model, tmp_path / "model.pt")):
        with pytest.raises(TypeError, match="an AdapterBank serves this model, so it cannot be copied"):
            call()


def test_a_batch_that_has_ended_keeps_nothing_of_where_it_ran(served: Served) -> None:
    ended, seen = [], list[weakref.ref[nn.Module]]()

    def run() -> Iterator[None]:
        local = nn.Linear(2, 2)
        seen.append(weakref.ref(local))
        with served.bank.rows(["a"]) as batch:
            ended.append(batch)
            yield

    list(run())
    gc.collect()
    assert seen[0]() is None


# Checkpoints, whose layers run again in the backward pass


class Checkpointed(type(MODELS["mlp"]())):  # type: ignore[misc]
    """Its layers run again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.lin1(torch.tanh(self.lin0(x))), x, use_reentrant=False)
        output: Tensor = self.lin2(torch.tanh(hidden))
        return output


def checkpointed() -> nn.Module:
    model = Checkpointed()
    model.load_state_dict(MODELS["mlp"]().state_dict())
    return model


KIND = Kind(checkpointed, MLP.settings)
MIXED = ["c", "a", "b", "b"]


@pytest.fixture(params=[1, GROUPS], ids=["one group", "groups"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Together]:
    kind = KIND.by_groups(request.param)
    save_all(kind, tmp_path)
    with together(kind, tmp_path) as both:
        yield both


@pytest.mark.parametrize("where", ["in this thread", "in another one, as on a GPU"])
def test_a_checkpoint_is_repeated_in_its_batch(where: str, both: Together, tmp_path: Path) -> None:
    alone, batches = Alone(tmp_path, checkpointed), [batch_of(both.model, MIXED, number) for number in range(2)]
    with both.adapters.rows(MIXED) as rows, ThreadPoolExecutor(1) as pool:
        losses = [rows.loss(row_losses(both.model, batch.inputs)) for batch in batches]
        # The first pass is repeated after the second one.
        for loss in losses:
            loss.backward() if where == "in this thread" else pool.submit(loss.backward).result(30)
    for batch in batches:
        alone.backward(batch)
    check_gradients(both, alone)


def test_a_checkpoint_of_an_ended_batch_is_not_repeated_in_another_one(both: Together) -> None:
    batch = batch_of(both.model, MIXED)
    for names in (None, MIXED[::-1]):
        with both.adapters.rows(MIXED) as rows:
            loss = rows.loss(row_losses(both.model, batch.inputs))
        with ExitStack() as stack:
            if names is not None:
                stack.enter_context(both.adapters.rows(names))
            with pytest.raises(ValueError, match="repeats a checkpointed layer of a bank's model"):
                loss.backward()
