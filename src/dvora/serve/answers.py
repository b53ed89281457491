"""What the routes have in common: schema of bodies, rows for texts, headers that name what answered, who hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from .keys import BASE, asking
from .registry import Version
from .requests import RefusedError, Work
from .server import Gone, Row, Server

ADAPTER, DIGEST = "x-dvora-adapter", "x-dvora-digest"


class Body(BaseModel):
    """Of a request; fields that are not kept are errors, not ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def server_of(request: Request) -> Server:
    """The server that a request is for."""
    server: Server = request.app.state.server
    return server


@asynccontextmanager
async def listening(request: Request) -> AsyncIterator[Gone]:
    """A future that is done when the client hangs up."""
    hung_up = asyncio.ensure_future(_until_gone(request))
    try:
        yield hung_up
    finally:
        hung_up.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def rows_of(
    request: Request, work: Work, models: Sequence[str | None], texts: Sequence[Any], truncate: bool = False
) -> list[Row]:
    """What comes out for texts, one after another, each by all models; no model is the base.

    Raises:
        RefusedError: there are too many, a model is unknown, or a text too long.
    """
    server = server_of(request)
    server.require(work)
    most, count = server.settings.limits.queue, len(models) * len(texts)
    if not 0 < count <= most:
        raise RefusedError(400, f"the request has {count:,} rows (texts times models), expected 1 to {most:,}")
    key = await asking(request)
    names = [None if model is None else server.registry.named(model, key) for model in models]
    tokens = await asyncio.to_thread(lambda: [server.text(text, truncate=truncate) for text in texts])
    async with listening(request) as gone:
        return await server.rows(work, [(name, text) for text in tokens for name in names], gone)


def headers_of(versions: Iterable[Version | None]) -> dict[str, str]:
    """The headers that say whose answer it is: names and digests, once each, in the order of the rows."""
    names = {BASE if version is None else version.name: digest_of(version) for version in versions}
    return {ADAPTER: ",".join(names), DIGEST: ",".join(names.values())}


def digest_of(version: Version | None) -> str:
    """What names the content that answered."""
    return BASE if version is None else str(version.digest)


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}
