"""The process of a server: its socket, its logs, its end."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable

import uvicorn

from .app import make_app
from .server import Server, Settings

LARGEST_HEADERS = 2**14
"""Bytes."""
DRAINING_SECONDS = 30
IDLE_SECONDS = 10
"""After which a connection without requests is closed."""


class JsonLines(logging.Formatter):
    """Records as lines of JSON; a message may be names and values."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        content = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        trace = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        head = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower()}
        return json.dumps({**head, **content, **trace}, ensure_ascii=False)


def serve(settings: Settings, host: str, port: int, connections: int, tell: Callable[[str], None] | None) -> None:
    """Serve until a signal comes.

    Args:
        settings: of the server.
        host, port: to listen on; port 0 takes a free one.
        connections: at most.
        tell: called with what whoever started it should know; None logs nothing.

    Raises:
        ValueError: the base or an adapter cannot be served.
        OSError: the port is taken.
    """
    # Before the model is loaded, which takes seconds.
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        if tell is not None:
            handler = logging.StreamHandler()
            handler.setFormatter(JsonLines())
            logging.getLogger("dvora.serve").addHandler(handler)
            logging.getLogger("dvora.serve").setLevel(logging.INFO)
        server = Server(settings)
        if tell is not None:
            address = f"http://{host}:{listening.getsockname()[1]}"
            tell(f"{server.base.name} with {len(server.registry):,} adapters at {address}; Ctrl-C stops it")
        config = uvicorn.Config(
            make_app(server),
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=connections,
            h11_max_incomplete_event_size=LARGEST_HEADERS,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=DRAINING_SECONDS,
            http="h11",
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[listening])
