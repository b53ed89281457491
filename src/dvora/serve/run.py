"""The process of a server: its socket, its logs, its end."""

from __future__ import annotations

import errno
import gc
import json
import logging
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from .access import Keys
from .connections import HEAD_SECONDS, Connection
from .settings import Settings

DRAINING_SECONDS = 30
OTHER_FILES = 256
"""That may be open beside connections."""


class JsonLines(logging.Formatter):
    """Records as lines of JSON; a message may be names and values."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        content = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        trace = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        head = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        return json.dumps({**head, **content, **trace})


def serve(settings: Settings, host: str, port: int, connections: int, report: Callable[[str], None] | None) -> None:
    """Serve until a signal comes.

    Args:
        settings: of the server.
        host, port: to listen on; port 0 takes a free one.
        connections: at most.
        report: called with what whoever started it should know; None logs nothing.
    """
    # Before models' libraries and the model are loaded, which takes seconds.
    _allow_files(connections + OTHER_FILES)
    Keys(settings.token, settings.keys)
    with _listening(host, port) as listening:
        from .app import make_app
        from .server import Server

        if report is not None:
            handler = logging.StreamHandler()
            handler.setFormatter(JsonLines())
            logging.getLogger("dvora.serve").setLevel(logging.INFO)
            for name in ("dvora.serve", "uvicorn.error"):
                logging.getLogger(name).addHandler(handler)
        server = Server(settings.model_copy(update={"allow_host": (host, *settings.allow_host)}))
        # What is loaded by now stays, so that no collection of garbage goes through it.
        gc.freeze()
        if report is not None:
            name = f"[{host}]" if ":" in host else host
            address = f"http://{name}:{listening.getsockname()[1]}"
            report(f"{server.base.name} with {len(server.base.bank):,} adapters at {address}; Ctrl-C stops it")
        uvicorn.Server(config_of(make_app(server), connections)).run(sockets=[listening])


def config_of(app: ASGIApp, connections: int) -> uvicorn.Config:
    """How uvicorn serves an application."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # It refuses requests already when there are as many.
        limit_concurrency=connections + 1,
        timeout_keep_alive=HEAD_SECONDS,
        timeout_graceful_shutdown=DRAINING_SECONDS,
        http=Connection,
        ws="none",
    )


def _listening(host: str, port: int) -> socket.socket:
    if not host:
        raise ValueError("--host is empty, expected an address such as 127.0.0.1; 0.0.0.0 is every network")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family)[0][4]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"--host is {host!r}, expected an address or a name of this machine") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port} of {host} is in use; take another, or 0 for one that is free") from None
        raise ValueError(f"--host {host}, --port {port}: nothing can listen there ({error.strerror})") from None


def _allow_files(count: int) -> None:
    """Open more than a shell allows at first, often 1,024: who is refused a file cannot take another's place."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        if count > hard:
            raise ValueError(
                f"--connections is {count - OTHER_FILES:,}, and this process may open {hard:,} files (ulimit -Hn); "
                f"expected at most {hard - OTHER_FILES:,}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
