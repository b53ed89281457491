"""The server over HTTP: what every request passes (its size, its time, its token, its log), and the routes beside."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from . import adapter_routes, encoder_routes, openai_routes
from .answers import ADAPTER, DIGEST, error_body
from .requests import RefusedError
from .server import Server

LARGEST_JSON = 2**22
"""Bytes of a body that is no adapter."""
BODY_SECONDS = 30.0
"""In which a client has to send a body."""
PAGE = Path(__file__).with_name("page.html")
_log = logging.getLogger("dvora.serve.access")


def make_app(server: Server) -> FastAPI:
    """The application of a server, which closes it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.close)

    app = FastAPI(
        title="dvora serve",
        version=__version__,
        description="One base model, and for every request its own adapter.",
        lifespan=lifespan,
    )
    app.state.server = server
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _not_there)
    app.add_middleware(Guard, server=server)
    for routes in (openai_routes, encoder_routes, adapter_routes):
        app.include_router(routes.router)

    @app.get("/healthz", include_in_schema=False)
    @app.get("/health", tags=["the server"])
    async def health() -> Response:
        """Whether the engine runs."""
        return Response(status_code=200 if server.engine.is_alive else 503)

    @app.get("/readyz", tags=["the server"])
    async def ready() -> Response:
        """Whether requests are taken."""
        return Response(status_code=200 if server.engine.takes_requests else 503)

    @app.get("/metrics", tags=["the server"])
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return PlainTextResponse(server.metrics_text(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    return app


class Guard:
    """Around every request: its body is read here, bounded in bytes and seconds; who may change adapters; its log."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, headers = time.monotonic(), 500, dict[str, str]()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers.update({key.decode(): value.decode() for key, value in message["headers"]})
            await send(message)

        try:
            try:
                changes = _changes_adapters(scope)
                if changes:
                    self._check_token(scope)
                body = await self._body(
                    scope, receive, self.server.settings.largest_upload if changes else LARGEST_JSON
                )
                await self.server.follow()
            except RefusedError as refusal:
                # Of the body there may be more to come, which nobody reads.
                await _answer(refusal, {"Connection": "close"})(scope, receive, noted)
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

    def _check_token(self, scope: Scope) -> None:
        token = self.server.settings.token
        if token is None:
            raise RefusedError(
                403, "adapters cannot be changed over HTTP here: the server was started without a token", "forbidden"
            )
        given = _header(scope, b"authorization")
        if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RefusedError(
                401,
                "changing adapters needs the header 'Authorization: Bearer TOKEN' with the server's token",
                "unauthorized",
                {"WWW-Authenticate": "Bearer"},
            )


def _changes_adapters(scope: Scope) -> bool:
    path: str = scope["path"]
    loads = path in (adapter_routes.LOAD, adapter_routes.UNLOAD)
    return loads or (path.startswith("/v1/adapters") and scope["method"] not in ("GET", "HEAD"))


def _header(scope: Scope, name: bytes) -> str:
    values: list[bytes] = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if values else ""


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


def _answer(refusal: RefusedError, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    return JSONResponse(error_body(refusal.message, refusal.kind), refusal.status, {**refusal.headers, **headers})


async def _refused(_: Request, refusal: Any) -> Response:
    return _answer(refusal)


async def _invalid(_: Request, error: Any) -> Response:
    """What does not fit the schema of a route, in one sentence; the input is not repeated."""
    problems = [
        f"{'.'.join(str(part) for part in problem['loc'] if part != 'body') or 'the body'}: {problem['msg']}"
        for problem in error.errors()
    ]
    return JSONResponse(error_body("; ".join(dict.fromkeys(problems)), "invalid_request_error"), 400)


async def _not_there(_: Request, error: Any) -> Response:
    return JSONResponse(error_body(str(error.detail), "NotFoundError"), error.status_code, error.headers)
