"""What every request passes: its body is read here, bounded in bytes and seconds; its log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from types import MappingProxyType

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import ADAPTER, DIGEST, error_body
from .requests import RefusedError
from .server import Server

LARGEST_JSON = 2**22
"""Bytes of a body that is no adapter."""
BODY_SECONDS = 30.0
"""In which a client has to send a body."""
_log = logging.getLogger("dvora.serve.access")


class Guard:
    """Around every request: its body is read here, bounded in bytes and seconds; its log."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, headers = time.monotonic(), 500, dict[str, str]()
        scope.setdefault("state", {})["deadline"] = started + self.server.settings.timeout

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers.update({key.decode(): value.decode() for key, value in message["headers"]})
            await send(message)

        try:
            try:
                largest = self.server.settings.largest_upload if scope["method"] == "PUT" else LARGEST_JSON
                body = await self._body(scope, receive, largest)
                await self.server.follow()
            except RefusedError as refusal:
                # Of the body there may be more to come, which nobody reads.
                await answer_of(refusal, {"Connection": "close"})(scope, receive, noted)
                return
            await self.app(scope, _replayed(body, receive), noted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - started
            self.server.metrics.request(route, status, seconds)
            line = {
                "route": route,
                "method": scope["method"],
                "status": status,
                "milliseconds": round(1000 * seconds, 1),
                "adapter": headers.get(ADAPTER),
                "digest": headers.get(DIGEST),
            }
            _log.info({name: value for name, value in line.items() if value is not None})

    async def _body(self, scope: Scope, receive: Receive, most: int) -> bytes:
        too_large = RefusedError(413, f"the body is larger than the {most:,} bytes that are read here", "too_large")

        async def read() -> bytes:
            body, is_more = bytearray(), True
            while is_more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(499, "the client has gone", "client_closed_request")
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                is_more = message.get("more_body", False)
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise RefusedError(408, f"the body did not come in {BODY_SECONDS:g} seconds", "timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and then what the client does, which can only be hanging up."""
    was_given = False

    async def replay() -> Message:
        nonlocal was_given
        if was_given:
            return await receive()
        was_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def answer_of(refusal: RefusedError, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """A refusal as its client reads it."""
    return JSONResponse(
        error_body(refusal.message, refusal.kind), refusal.status, {**(refusal.headers or {}), **headers}
    )
