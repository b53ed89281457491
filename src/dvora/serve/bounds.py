"""What every request passes: its host, the bytes and seconds of its body, the bytes of its answer, its log."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .calls import ADAPTER, DIGEST, refused
from .requests import RefusedError
from .server import Server

LARGEST_JSON = 2**22
"""Bytes of a body that is no adapter."""
BODY_SECONDS = 30.0
"""From a request's beginning, in which a client has to send its body."""
PIECE = 2**16
"""Bytes of an answer that are sent at a time; smaller answers are not counted."""
_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^:\[\]]+))(:\d*)?")
_log = logging.getLogger("dvora.serve.access")


class Exchange:
    """A request and its answer, whose bytes are counted; a route raises `most` for a client that it has let in."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, guard: Guard) -> None:
        self.scope, self._receive, self._send, self.guard = scope, receive, send, guard
        self.arrived, self.most, self.held = time.monotonic(), LARGEST_JSON, 0
        self.status, self.headers = 500, Headers()
        self.pending: asyncio.Future[Any] | None = None
        """What the client is waited for with."""
        self._is_read = self._is_over = False

    async def receive(self) -> Message:
        """The next part of the body, and after it what the client does, which can only be hanging up.

        It is 413, if the body is too large, 408, if too slow, 503, if there is no memory, 499, if the client hangs up.
        """
        if self._is_read:
            return await self._receive()
        self._check(int(Headers(scope=self.scope).get("content-length", 0)))
        message: Message = await self._wait(self._receive(), self.arrived + BODY_SECONDS - time.monotonic())
        if message["type"] == "http.disconnect":
            raise RefusedError(499, "the client has hung up", "client_closed_request")
        part = message.get("body", b"")
        self._check(self.held + len(part))
        self.guard.take(self, len(part))
        self._is_read = not message.get("more_body", False)
        return message

    def _check(self, count: int) -> None:
        if count > self.most:
            raise RefusedError(413, f"the body is larger than the {self.most:,} bytes that are read here", "too_large")

    async def send(self, message: Message) -> None:
        """Send a part of the answer, in pieces, as fast as the client reads."""
        if self._is_over:
            return
        is_start, body, start = message["type"] == "http.response.start", message.get("body", b""), 0
        try:
            if is_start:
                headers = Headers(raw=message["headers"])
                if (size := int(headers.get("content-length", 0))) > PIECE:
                    self.guard.take(self, size)
                self.status, self.headers = message["status"], headers
            while len(body) - start > PIECE:
                await self._wait(self._send({**message, "body": body[start : start + PIECE], "more_body": True}), None)
                start += PIECE
        except RefusedError as refusal:
            if is_start:
                await refused(refusal)(self.scope, self.receive, self.send)
            self._is_over = True
            return
        await self._send({**message, "body": body[start:]} if start else message)

    async def _wait(self, client: Awaitable[Any], seconds: float | None) -> Any:
        """Wait for the client: 408, if it takes too long, 503, if others need its bytes."""
        self.pending = asyncio.ensure_future(client)
        try:
            await asyncio.wait({self.pending}, timeout=seconds)
            if self.pending.cancelled():
                raise _busy()
            if not self.pending.done():
                raise RefusedError(408, f"the body did not come in {BODY_SECONDS:g} seconds", "timeout")
            return self.pending.result()
        finally:
            self.pending.cancel()
            self.pending = None


class Guard:
    """Around every request, whatever server it came through; what routes hold is held until the answer is sent.

    It counts the bytes of all bodies and answers under way.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self.most, self.used = int(server.settings.body_memory * 2**20), 0
        self.exchanges: dict[Exchange, None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange, settings = Exchange(scope, receive, send, self), self.server.settings
        self.exchanges[exchange] = None
        async with AsyncExitStack() as held:
            held.callback(self._end, exchange)
            deadline = exchange.arrived + settings.timeout
            scope.setdefault("state", {}).update(incoming=exchange, deadline=deadline, held=held)
            try:
                _check_framing(scope)
                _check_host(scope, settings.allow_host)
                await self.server.follow()
            except RefusedError as refusal:
                await refused(refusal)(scope, exchange.receive, exchange.send)
            else:
                await self.app(scope, exchange.receive, exchange.send)

    def take(self, exchange: Exchange, count: int) -> None:
        """Count bytes, until the exchange ends; of too many the oldest slow clients are given up, or it is 503."""
        for oldest in [*self.exchanges] if self.used + count > self.most else ():
            # What has just come is waited for no longer, and cannot be cancelled.
            if self.used + count > self.most and oldest.held and oldest.pending and oldest.pending.cancel():
                self.give(oldest)
        if self.used + count > self.most:
            raise _busy()
        self.used += count
        exchange.held += count

    def give(self, exchange: Exchange) -> None:
        """Count the bytes of an exchange no longer."""
        self.used -= exchange.held
        exchange.held = 0

    def _end(self, exchange: Exchange) -> None:
        del self.exchanges[exchange]
        self.give(exchange)
        route = getattr(exchange.scope.get("route"), "path", "other")
        seconds = time.monotonic() - exchange.arrived
        self.server.metrics.request(route, exchange.status, seconds)
        line = {"route": route, "method": exchange.scope["method"][:10], "status": exchange.status}
        line["milliseconds"] = round(1000 * seconds, 1)
        named = {"adapter": exchange.headers.get(ADAPTER), "digest": exchange.headers.get(DIGEST)}
        _log.info({**line, **{name: value for name, value in named.items() if value is not None}})


def _check_framing(scope: Scope) -> None:
    """Refuse bodies that a proxy before this server may end elsewhere, and take what follows for a request."""
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
        message = "a body has one length; send Content-Length, or in HTTP/1.1 Transfer-Encoding: chunked"
        raise RefusedError(400, message, headers={"Connection": "close"})


def _check_host(scope: Scope, names: Sequence[str]) -> None:
    """Refuse names that a page from elsewhere may have been given this server's address for (DNS rebinding)."""
    hosts = [_HOST.fullmatch(value) for value in Headers(scope=scope).getlist("host")]
    if len(hosts) != 1 or hosts[0] is None:
        raise RefusedError(400, "a request has one header Host, such as localhost:8000")
    host = (hosts[0]["address"] or hosts[0]["name"]).lower()
    if not any(fnmatchcase(host, name.lower()) for name in ("localhost", *names)):
        try:
            ip_address(host)
        except ValueError:
            message = f"{host[:100]!r} is no name of this server; start it with --allow-host and that name"
            raise RefusedError(421, message, "misdirected_request") from None


def _busy() -> RefusedError:
    message = "bodies and answers that are under way fill the memory for them; send the request again"
    return RefusedError(503, message, "overloaded", {"Retry-After": "1"})
