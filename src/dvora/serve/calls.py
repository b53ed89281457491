"""A request of a client whose key is known: its body, what it waits for, what it gets of the engine, its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic_core import to_json
from torch import Tensor

from .access import BASE, Asking
from .bodies import B, parsed
from .requests import Answer, RefusedError, Work
from .requests import Request as EngineRequest
from .server import Server
from .store import Served
from .texts import Input, Text

ADAPTER, DIGEST = "x-dvora-adapter", "x-dvora-digest"
encoded = partial(to_json, inf_nan_mode="null")
MOST_NUMBERS, SMALL_BODY = 2**21, 2**16
"""Of an answer; and bytes of a body that are read in a millisecond."""
T = TypeVar("T")


class Row(NamedTuple):
    """What came out for one row."""

    version: Served | None
    """Of its adapter; None is the base."""
    values: Tensor
    read: Text


def whose(version: Served | None) -> dict[str, str]:
    """The fields of a row that say which version gave it."""
    name, digest = (BASE, BASE) if version is None else (version.name, str(version.digest))
    return {"adapter": name, "digest": digest}


def headers_of(versions: Iterable[Served | None]) -> dict[str, str]:
    """The headers that say which version answered, if it was one; of several the rows say it."""
    distinct = {*versions}
    return dict(zip((ADAPTER, DIGEST), whose(distinct.pop()).values(), strict=True)) if len(distinct) == 1 else {}


def answer(content: Any, versions: Iterable[Served | None] = (), status: int = 200) -> Response:
    """An answer, by the versions that gave it; bytes are JSON already."""
    body = content if isinstance(content, bytes) else encoded(content)
    return Response(body, status, headers_of(versions), "application/json")


def error_body(refusal: RefusedError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.kind}}


def refused(refusal: RefusedError) -> Response:
    """A refusal as its client reads it."""
    return JSONResponse(error_body(refusal), refusal.status, refusal.headers)


class Call:
    """A dependency of all routes of models."""

    def __init__(self, request: Request, key: Asking) -> None:
        self.request, self.key = request, key
        self.server: Server = request.app.state.server
        self._hung_up: asyncio.Future[None] | None = None

    async def read(self, kind: type[B]) -> B:
        """The body; what takes long to read waits for its turn beside the loop. What is none of this kind is 400."""
        body = await self.request.body()
        # A page of another site can send anything but this without asking.
        if not self.request.headers.get("content-type", "").partition(";")[0].strip().endswith("json"):
            raise RefusedError(400, "the body has to be JSON; send it with the header 'Content-Type: application/json'")
        if len(body) <= SMALL_BODY:
            return parsed(body, kind)
        return await self.in_turn(len(body), lambda: parsed(body, kind))

    async def in_turn(self, size: int, function: Callable[[], T]) -> T:
        """What a function gives that is called in a thread, in which clients take turns."""
        return await self.server.texts.run(size, self.key.queue_of(None), lambda _: function())

    async def wait(self, wanted: Awaitable[T]) -> T:
        """What comes in time: 504, if it does not, 499, if the client hangs up."""
        if self._hung_up is None:
            self._hung_up = asyncio.ensure_future(self._until_hung_up())
            self.request.state.held.callback(self._hung_up.cancel)
        task, left = asyncio.ensure_future(wanted), self.request.state.deadline - time.monotonic()
        try:
            either: set[asyncio.Future[Any]] = {task, self._hung_up}
            await asyncio.wait(either, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._hung_up.done():
                raise RefusedError(499, "the client has hung up", "client_closed_request")
            raise RefusedError(504, "no answer came in the time that a request may take here", "timeout")
        finally:
            task.cancel()

    async def _until_hung_up(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def named(self, model: str | None) -> str | None:
        """The adapter of a name that a client gives, or that stands in the address; none is the base."""
        if model is None:
            model = self.request.query_params.get("model", self.server.base.name)
        return self.server.registry.named(model, self.key)

    def check(self, rows: int) -> None:
        """Refuse more rows than may wait, with 400."""
        most = self.server.settings.queue
        if not 0 < rows <= most:
            raise RefusedError(400, f"the request has {rows:,} rows (texts times models), expected 1 to {most:,}")

    async def change(self, name: str, function: Callable[[str], T]) -> T:
        """Change an adapter; clients take turns, in a thread that nobody else waits for.

        It is 403, if the key is not for the name, and 504, if its turn does not come in time; what has begun is ended.
        """
        self.key.check_changes(name)

        def in_time() -> T:
            if time.monotonic() > self.request.state.deadline:
                raise RefusedError(504, "others change adapters all the time, and nothing was changed", "timeout")
            return function(name)

        return await self.server.changes.run(self.key.queue_of(None), in_time)

    async def rows(
        self, work: Work, models: Sequence[str | None], texts: Sequence[Input], truncate: bool = False
    ) -> list[Row]:
        """What comes out for texts, one after another, each by all models, in as few batches as they fit."""
        server = self.server
        server.base.require(work)
        self.check(len(models) * len(texts))
        names = [self.named(model) for model in models]
        if work == "classify" and not server.base.has_own_head and None in names:
            raise RefusedError(
                400, f"{server.base.name} has no trained head of its own, so it classifies nothing; name an adapter"
            )
        if work == "classify" and server.base.has_tags and not all(isinstance(text, str) for text in texts):
            raise RefusedError(
                400, f"the tokens of {server.base.name} are classified in texts, not in pairs; send texts"
            )
        read = await self.wait(server.texts.read(texts, self.key.queue_of(names[0]), truncate=truncate))
        rows = [(name, text) for text in read for name in names]
        loop = asyncio.get_running_loop()
        answers = [loop.create_future() for _ in rows]

        def deliver(request: EngineRequest, answer: Answer) -> None:
            # Unless the loop has ended with all who waited there.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answers[request.number], answer)

        async with AsyncExitStack() as held:
            # Adapters are read within the client's time.
            versions = await self.wait(held.enter_async_context(server.versions(names)))
            requests = [
                EngineRequest(
                    work, versions[name], text.tokens, deliver, text.types, number=number,
                    queue=self.key.queue_of(name), deadline=self.request.state.deadline,
                )
                for number, (name, text) in enumerate(rows)
            ]  # fmt: skip
            server.engine.submit(requests)
            try:
                self.key.tokens.take(sum(len(text.tokens) for _, text in rows))
                values = await self.wait(asyncio.gather(*answers))
            finally:
                server.engine.cancel(requests)
        return [Row(versions[name], value, text) for (name, text), value in zip(rows, values, strict=True)]

    async def answer_rows(self, rows: Sequence[Row], item: Callable[[int, Row], Any], **frame: Any) -> Response:
        """An answer with an item for each row, written in a thread, where others take turns with it.

        Args:
            rows: with what came out.
            item: of a row and its number, called in the thread.
            frame: what stands beside `data`; without it the items are all.
        """
        if (size := sum(row.values.numel() for row in rows)) > MOST_NUMBERS:
            raise RefusedError(
                400, f"the answer has {size:,} numbers, expected at most {MOST_NUMBERS:,}; send fewer texts"
            )
        content = await self.in_turn(size, lambda: b",".join(encoded(item(*row)) for row in enumerate(rows)))
        before, after = (encoded(frame)[:-1] + b',"data":[', b"]}") if frame else (b"[", b"]")
        return answer(before + content + after, [row.version for row in rows])


def _settle(future: asyncio.Future[Tensor], answer: Answer) -> None:
    if future.done():
        # Nobody waits for it any more.
        return
    if answer.error is None:
        future.set_result(answer.values)
    else:
        future.set_exception(answer.error)


Here = Annotated[Call, Depends()]


def sent(kind: type[B]) -> Any:
    """A dependency: the body. Unlike FastAPI's it is read after the key, and what is wrong is told in a few words."""

    async def body(call: Here) -> B:
        return await call.read(kind)

    return Depends(body)
