"""What the routes have in common: the schema of bodies, headers that name what answered, errors, who hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from .registry import Version
from .server import Gone, Server

ADAPTER, DIGEST = "x-dvora-adapter", "x-dvora-digest"
BASE = "base"
"""In place of an adapter and of its digest."""


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
