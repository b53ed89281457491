"""A running server without HTTP: texts become requests of the engine, and what comes out is waited for."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ..recipes.settings import NAMED, Trust
from .base import open_base
from .engine import Engine
from .keys import Keys
from .metrics import Metrics
from .registry import Registry, Version
from .requests import Answer, Piece, RefusedError, Request, Sampling, Work
from .scheduler import Limits
from .store import Store

_Changed = TypeVar("_Changed")
Gone = asyncio.Future[None]
"""Is done when the client has hung up."""


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Args:
        base: folder or name of the base model.
        adapters: a folder of adapters or runs, or a pack.
        limits: of batches and of the queue.
        host_bytes: of adapters in memory.
        dtype: of the base's weights: auto, float32, bfloat16 or float16.
        max_length: tokens of a text; None: what the model takes.
        token: of whoever may change all adapters; None: nobody may, unless his key says so.
        keys: the file of the tenants' keys; None: everybody may ask.
        timeout: seconds that a request may take.
        largest_upload: bytes of an adapter in a request.
        trust: whether the base may be fetched.
        body_memory: bytes of all bodies and answers that are under way.
        allow_hosts: names, or patterns as in a shell, that requests may be for, beside localhost and addresses.
        is_shared: whether other servers have the same adapters, which change for all of them.
    """

    base: str
    adapters: Path
    limits: Limits = field(default_factory=Limits)
    host_bytes: int = 2**30
    dtype: str = "auto"
    max_length: int | None = None
    token: str | None = None
    keys: Path | None = None
    timeout: float = 120.0
    largest_upload: int = 2**26
    trust: Trust = NAMED
    body_memory: int = 2**28
    allow_hosts: tuple[str, ...] = ()
    is_shared: bool = False


class Text(NamedTuple):
    """A text, or a pair of them, as tokens."""

    tokens: Sequence[int]
    types: Sequence[int] | None = None


class Row(NamedTuple):
    """What came out for one row."""

    version: Version | None
    """Of its adapter; None is the base."""
    values: Tensor
    tokens: int
    """Of its text."""


class Server:
    """One base, its adapters and its engine.

    Args:
        settings: of the server.

    Raises:
        ValueError: the base or an adapter cannot be served; the message names it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.keys = Keys(settings.token, settings.keys)
        self.store = Store(settings.adapters, settings.is_shared)
        try:
            opened, damaged = self.store.open()
            self.base = open_base(
                settings.base,
                next((stored.source.description for stored in opened.values()), None),
                settings.limits.slots,
                settings.host_bytes,
                settings.dtype,
                settings.trust,
            )
            self.registry = Registry(self.base.bank, self.store, self.base.name)
            self.registry.open(opened, damaged)
            # Of its own: a tokenizer that truncates is changed by that, and the engine decodes with the other one.
            self._tokenizer, self._tokenizing = copy.deepcopy(self.base.tokenizer), threading.Lock()
            limits = (settings.max_length, self.base.longest(), settings.limits.cache_tokens)
            self.longest = min(limit for limit in limits if limit is not None)
            self._changes = ThreadPoolExecutor(1, "dvora-changes")
            self.engine = Engine(self.base, settings.limits, self.longest, self.metrics)
        except BaseException:
            self.store.close()
            raise

    def close(self, seconds: float = 30.0) -> None:
        """Answer what has been taken, for some seconds, and free everything."""
        self._changes.shutdown()
        self.engine.close(seconds)
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

    def text(
        self,
        text: str | Sequence[str] | Sequence[int],
        *,
        truncate: bool = False,
        room: int = 0,
        is_template: bool = False,
    ) -> Text:
        """A text, a pair, or tokens, as the model reads them.

        Args:
            text: as a client sent it.
            truncate: cut what is longer than the model reads, in place of a refusal.
            room: tokens that are left for a continuation.
            is_template: whether the text has the special tokens of a chat's template already.

        Raises:
            RefusedError: 400, it is empty or too long.
        """
        most = self.longest - room
        if not isinstance(text, str) and all(isinstance(token, int) for token in text):
            vocabulary = self.base.model.get_input_embeddings().num_embeddings
            tokens: Sequence[int] = [int(token) for token in text]
            if any(not 0 <= token < vocabulary for token in tokens):
                raise RefusedError(400, f"a token is not from 0 to {vocabulary - 1}; use the base's tokenizer")
            types = None
        else:
            parts = (text,) if isinstance(text, str) else tuple(map(str, text))
            with self._tokenizing:
                encoded = self._tokenizer(*parts, verbose=False, add_special_tokens=not is_template)
                if len(encoded["input_ids"]) > most and truncate:
                    encoded = self._tokenizer(*parts, truncation=True, max_length=most)
            tokens, types = encoded["input_ids"], encoded.get("token_type_ids")
        if not tokens:
            raise RefusedError(400, "the input has no tokens; send a text")
        if len(tokens) > most:
            advice = "send a shorter one" if self.base.generates else "send a shorter one, or truncate: true"
            raise RefusedError(400, f"the input has {len(tokens):,} tokens, and at most {most:,} are read; {advice}")
        return Text(tokens, types)

    async def changed(self, change: Callable[[], _Changed]) -> _Changed:
        """What a change of adapters gives; they are made one after another, in a thread that nobody else waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._changes, change)

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

    async def rows(self, work: Work, rows: Sequence[tuple[str | None, Text]], gone: Gone) -> list[Row]:
        """Classify or embed texts, each by an adapter, in as few batches as they fit.

        Args:
            work: classify or embed.
            rows: the name of an adapter, None for the base, and its text.
            gone: see `Gone`.

        Raises:
            RefusedError: an adapter is unknown or damaged, the queue is full, or it took too long.
        """
        self.require(work)
        if work == "classify" and not self.base.has_own_head and any(name is None for name, _ in rows):
            raise RefusedError(
                400, f"{self.base.name} has no trained head of its own, so it classifies nothing; name an adapter"
            )
        loop = asyncio.get_running_loop()
        async with self.versions(name for name, _ in rows) as versions:
            answers: list[asyncio.Future[Answer]] = [loop.create_future() for _ in rows]
            place: dict[Request, int] = {}

            def hear(request: Request, answer: Piece | Answer) -> None:
                _tell(loop, _set, answers[place[request]], answer)

            for number, (name, text) in enumerate(rows):
                version = versions[name]
                key = None if version is None else version.key
                place[Request(work, key, text.tokens, hear, token_types=text.types)] = number
            self.engine.submit([*place])
            try:
                values = await self._in_time(asyncio.gather(*answers), gone)
            finally:
                self.engine.cancel([*place])
        for answer in values:
            if answer.error is not None:
                raise _failed(answer.error)
        return [
            Row(versions[name], answer.values, len(text.tokens))
            for (name, text), answer in zip(rows, values, strict=True)
        ]

    @asynccontextmanager
    async def generation(
        self, name: str | None, text: Text, sampling: Sampling, gone: Gone
    ) -> AsyncIterator[tuple[Version | None, AsyncIterator[Piece | Answer]]]:
        """Generate a text: its adapter's version, and its pieces with the answer as the last one.

        Raises:
            RefusedError: the adapter is unknown or damaged, the queue is full, or it took too long.
        """
        self.require("generate")
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Piece | Answer]()

        def hear(_: Request, part: Piece | Answer) -> None:
            _tell(loop, heard.put_nowait, part)

        async with self.versions([name]) as versions:
            version = versions[name]
            request = Request("generate", None if version is None else version.key, text.tokens, hear, sampling)
            self.engine.submit([request])
            try:
                yield version, self._pieces(heard, gone)
            finally:
                self.engine.cancel([request])

    async def _pieces(self, heard: asyncio.Queue[Piece | Answer], gone: Gone) -> AsyncIterator[Piece | Answer]:
        while True:
            part = await self._in_time(asyncio.ensure_future(heard.get()), gone)
            if isinstance(part, Answer) and part.error is not None:
                raise _failed(part.error)
            yield part
            if isinstance(part, Answer):
                return

    async def _in_time(self, wanted: asyncio.Future[Any], gone: Gone) -> Any:
        done, _ = await asyncio.wait({wanted, gone}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
        if wanted in done:
            return wanted.result()
        wanted.cancel()
        if gone in done:
            raise RefusedError(499, "the client has gone", "client_closed_request")
        raise RefusedError(504, f"no answer came in {self.settings.timeout:g} seconds", "timeout")

    def metrics_text(self) -> bytes:
        """What Prometheus reads."""
        stats = self.base.bank.stats()
        running, waiting = self.engine.adapters()
        names = {version.key: version.name for version in self.registry.versions()}
        values = {
            "queue_size": float(self.engine.waiting()),
            "adapters": float(len(self.registry)),
            "slots": float(stats.slots),
            "slots_filled": float(stats.slots_filled),
            "slot_bytes": float(stats.device_bytes),
            "host_bytes": float(stats.host_bytes),
            "adapter_loads": float(stats.loads),
            "adapter_reads": float(stats.reads),
            "adapter_evictions": float(stats.evictions),
        }
        return self.metrics.text(
            values,
            sorted(names.get(key, key) for key in running),
            sorted(names.get(key, key) for key in waiting),
            stats.slots,
        )


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Call something in the loop's thread, unless the loop has ended with all who listened there."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


def _set(future: asyncio.Future[Any], answer: Piece | Answer) -> None:
    if not future.done():
        future.set_result(answer)


def _failed(error: BaseException) -> RefusedError:
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ValueError):
        # Of the bank: an adapter's files are other ones than when it was loaded, or are gone.
        return RefusedError(422, str(error), "adapter_error")
    return RefusedError(500, "the model failed on this input; the server's log says why", "server_error")
