"""A running server without HTTP: texts become requests of the engine, and what comes out is waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ..recipes.models.bases import longest_text
from .base import open_base
from .engine import Engine
from .keys import Key, Keys
from .metrics import Metrics
from .registry import Registry, Version
from .requests import Answer, Piece, RefusedError, Request, Sampling, Work
from .settings import Settings
from .store import Store
from .texts import Text, Texts
from .turns import Turns

T = TypeVar("T")


@dataclass(frozen=True)
class Client:
    """Who waits for an answer.

    Args:
        key: what it may ask for.
        deadline: of the whole request, by `time.monotonic`.
        gone: is done when the client has hung up.
    """

    key: Key
    deadline: float
    gone: asyncio.Future[None]

    async def wait(self, wanted: Awaitable[T]) -> T:
        """What comes before the deadline, unless the client hangs up.

        Raises:
            RefusedError: 504, the time is over; 499, nobody listens.
        """
        task = asyncio.ensure_future(wanted)
        try:
            left = self.deadline - time.monotonic()
            if left > 0:
                either: set[asyncio.Future[Any]] = {task, self.gone}
                await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self.gone.done():
                raise RefusedError(499, "the client has gone", "client_closed_request")
            raise RefusedError(504, "no answer came in the time that a request may take here", "timeout")
        finally:
            task.cancel()


class Server:
    """One base, its adapters and its engine.

    Args:
        settings: how it is set up.
        is_shared: whether other servers have the same adapters, which change for all of them.

    Raises:
        ValueError: the base or an adapter cannot be served; the message names it.
    """

    def __init__(self, settings: Settings, is_shared: bool = False) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.keys = Keys(settings.token, settings.keys)
        self.store = Store(settings.adapters, is_shared)
        try:
            opened, damaged = self.store.open()
            self.base = open_base(settings, next(iter(opened.values()), None))
            self.registry = Registry(self.base, self.store)
            self.registry.open(opened, damaged)
            readable = longest_text(self.base.tokenizer, self.base.model.config.get_text_config())
            self.longest = min(settings.max_length or readable, readable, settings.cache_tokens)
            self.texts = Texts(self.base, self.longest)
            self.changes = Turns("dvora-changes")
            self.engine = Engine(self.base, settings, self.longest, self.metrics)
        except BaseException:
            self.store.close()
            raise

    def close(self, seconds: float = 30.0) -> None:
        """Answer what has been taken, for some seconds, and free everything."""
        self.changes.close()
        self.engine.close(seconds)
        self.texts.close()
        self.base.bank.close()
        self.store.close()

    @property
    def works(self) -> tuple[Work, ...]:
        """What this base does."""
        if self.base.generates:
            return ("generate",)
        return ("classify", "embed") if self.base.classifies else ("embed",)

    def require(self, work: Work) -> None:
        """Refuse what this base does not do.

        Raises:
            RefusedError: 400.
        """
        if work not in self.works:
            raise RefusedError(400, f"{self.base.name} cannot {work}; it is served to {' and '.join(self.works)}")

    async def follow(self) -> None:
        """Serve what servers that share the adapters have changed.

        Raises:
            RefusedError: 503, it cannot be read here.
        """
        if self.store.is_behind():
            await asyncio.to_thread(self.registry.follow)

    @asynccontextmanager
    async def versions(self, names: Iterable[str | None]) -> AsyncIterator[dict[str | None, Version | None]]:
        """Hold the adapters that answer now under these names.

        An adapter that was never used is read beside the engine, so that no batch waits for a disk.
        """
        distinct = dict.fromkeys(names)
        for name in distinct:
            if self.registry.is_cold(name):
                await asyncio.to_thread(self.registry.warm, name)
        with ExitStack() as held:
            yield {name: held.enter_context(self.registry.using(name)) for name in distinct}

    @asynccontextmanager
    async def asking(
        self, work: Work, rows: Sequence[tuple[str | None, Text]], client: Client, sampling: Sampling
    ) -> AsyncIterator[tuple[list[Version | None], AsyncIterator[tuple[int, Piece | Answer]]]]:
        """Have the engine work on rows while this is open: their versions, and what comes, with the row's number.

        Args:
            work: of all rows.
            rows: the name of an adapter, None for the base, and its text.
            client: who waits.
            sampling: of generated texts.

        Raises:
            RefusedError: an adapter is unknown or damaged, the queue is full, or it took too long.
        """
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Answer]]()
        place: dict[Request, int] = {}

        def hear(request: Request, part: Piece | Answer) -> None:
            # Unless the loop has ended with all who listened there.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(heard.put_nowait, (place[request], part))

        async def parts() -> AsyncIterator[tuple[int, Piece | Answer]]:
            answered = 0
            while answered < len(rows):
                number, part = heard.get_nowait() if heard.qsize() else await client.wait(heard.get())
                if isinstance(part, Piece):
                    # What is generated is the client's to pay.
                    client.key.tokens.take(1)
                else:
                    answered += 1
                    if part.error is not None:
                        raise part.error
                yield number, part

        async with AsyncExitStack() as held:
            # Adapters are read within the client's time.
            versions = await client.wait(held.enter_async_context(self.versions(name for name, _ in rows)))
            for number, (name, text) in enumerate(rows):
                version, queue = versions[name], client.key.queue_of(name)
                adapter = None if version is None else version.key
                request = Request(work, adapter, text.tokens, hear, sampling, text.types, queue, client.deadline)
                place[request] = number
            self.engine.submit([*place])
            try:
                client.key.tokens.take(sum(len(text.tokens) for _, text in rows))
                yield [versions[name] for name, _ in rows], parts()
            finally:
                self.engine.cancel([*place])

    def metrics_text(self) -> bytes:
        """What Prometheus reads."""
        stats = self.base.bank.stats()
        names = {version.key: version.name for version in self.registry.versions()}
        running, waiting = (sorted(names.get(key, key) for key in keys) for keys in self.engine.adapters())
        values = {
            "queue_size": self.engine.waiting(),
            "adapters": len(self.registry),
            "slots": stats.slots,
            "slots_filled": stats.slots_filled,
            "slot_bytes": stats.device_bytes,
            "host_bytes": stats.host_bytes,
            "adapter_loads": stats.loads,
            "adapter_reads": stats.reads,
            "adapter_evictions": stats.evictions,
        }
        return self.metrics.text(values, running, waiting, stats.slots)
