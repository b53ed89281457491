"""The server over HTTP: the routes, and how errors are answered."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from .. import __version__
from . import adapter_routes, encoder_routes, openai
from .access import Asking, asking
from .bounds import Guard
from .calls import answer, refused
from .requests import RefusedError
from .server import Server

PAGES = {
    path: Path(__file__).with_name(name).read_text(encoding="utf-8")
    for path, name in (("/", "page.html"), ("/docs", "routes.html"))
}


router = APIRouter(tags=["the server"])


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
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: _refused, RequestValidationError: _refused},
    )
    app.state.server = server
    app.add_middleware(Guard, server=server)
    for routes in (openai, encoder_routes, adapter_routes):
        app.include_router(routes.router, dependencies=[Depends(asking)])
    app.include_router(adapter_routes.changes)
    app.include_router(router)
    for path, page in PAGES.items():
        app.add_api_route(path, partial(_page, page), include_in_schema=False)
    return app


@router.get("/healthz", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the engine runs."""
    return Response(status_code=200 if request.app.state.server.engine.is_alive else 503)


@router.get("/readyz")
async def ready(request: Request) -> Response:
    """Whether requests are taken, and how many adapters were left out at the start."""
    server = request.app.state.server
    is_ready = server.engine.takes_requests
    return answer({"ready": is_ready, "left_out": len(server.registry.damaged)}, status=200 if is_ready else 503)


@router.get("/metrics")
async def metrics(request: Request, key: Asking) -> Response:
    """Counters, for Prometheus; where there are keys, for one that sees all adapters."""
    if not key.sees_all:
        raise RefusedError(403, "metrics are of all adapters, and this key is for some", "forbidden")
    return PlainTextResponse(request.app.state.server.metrics_text(), media_type="text/plain; version=0.0.4")


async def _refused(_: Request, error: Any) -> Response:
    """What routes refuse, or the router, or the parameters of a route, whose input is not repeated."""
    if isinstance(error, RequestValidationError):
        problems = [f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()]
        error = RefusedError(400, "; ".join(dict.fromkeys(problems)))
    elif not isinstance(error, RefusedError):
        error = RefusedError(error.status_code, str(error.detail), "NotFoundError", error.headers)
    return refused(error)


async def _page(html: str) -> Response:
    """A page that loads nothing from elsewhere, in which no scripts run but its own."""
    texts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    scripts = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)
    policy = (
        f"default-src 'none'; script-src {scripts}; connect-src 'self'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})
