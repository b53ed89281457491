"""Connections that send nothing, too slowly, no HTTP, or do not read: they end, and others are served."""

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import pytest

from dvora.serve import connections
from tests.bank.versions import until
from tests.serve.served import Serving, ask, copied, serving

HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
POST = b"POST /v1/classify HTTP/1.1\r\n" + HEAD
SECOND = b"GET /v1/models HTTP/1.1\r\n" + HEAD + b"\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NO_HTTP = {
    "two ways to end a body": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "chunks of HTTP/1.0": CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n" + SECOND,
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n000000" + SECOND,
    "a list of lengths": POST + b"Content-Length: 5, 6\r\n\r\n000000" + SECOND,
    "a length with a sign": POST + b"Content-Length: +5\r\n\r\n00000" + SECOND,
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "two codings": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SECOND,
    "a coding twice": POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n" + SECOND,
    "a space in a name": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a return in a value": POST + b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a lone line feed": POST + b"X: a\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + SECOND,
    "a chunk of no size": CHUNKED + b"0x5\r\n00000\r\n0\r\n\r\n" + SECOND,
    "a chunk with a long size": CHUNKED + b"0" * 30_000 + b"5\r\n00000\r\n0\r\n\r\n",
    "a chunk that ends elsewhere": CHUNKED + b"5\r\n00000XX0\r\n\r\n" + SECOND,
    "a body in crumbs": CHUNKED + b"1\r\nx\r\n" * 2000,
    "a long header": b"GET / HTTP/1.1\r\n" + HEAD + b"X: " + b"x" * 30_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\n" + HEAD * 2 + b"\r\n",
}


@contextlib.contextmanager
def connected(client: httpx.Client, *parts: bytes) -> Iterator[socket.socket]:
    """A connection over which something was sent."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.settimeout(20)
        for part in parts:
            connection.sendall(part)
        yield connection


def received(connection: socket.socket) -> bytes:
    """All that comes, until the server ends it."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(2**16):
            content += part
    return content


def test_what_is_no_http(caplog: pytest.LogCaptureFixture, critics: Serving) -> None:
    client, _ = critics
    for name, content in NO_HTTP.items():
        with connected(client, content) as connection:
            answers = received(connection)
        assert answers.startswith(b"HTTP/1.1 400 "), name
        assert b'"object"' not in answers, name
    # Within a body, when its request runs already.
    with connected(client, CHUNKED + b"5\r\n00000\r\n") as connection:
        time.sleep(0.2)
        connection.sendall(b"zz\r\n")
        assert received(connection).startswith(b"HTTP/1.1 400 ")
    assert ask(client, "a0").status_code == 200
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_other_protocols_are_not_spoken(critics: Serving) -> None:
    upgrade = b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: %b\r\nConnection: close\r\n" + HEAD + b"\r\n"
    client, _ = critics
    for content, status in (
        (b"CONNECT elsewhere:443 HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n", b"404"),
        (b"GET http://elsewhere/health HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n", b"404"),
        (upgrade % b"websocket", b"200"),
        (upgrade % b"h2c", b"200"),
    ):
        with connected(client, content) as connection:
            assert received(connection).startswith(b"HTTP/1.1 " + status), content


def test_silent_and_slow_ones_are_closed(
    critic: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1)
    unread_body = b"PUT /v1/adapters/x HTTP/1.1\r\nContent-Length: 1000000\r\n" + HEAD + b"\r\n"
    with (
        serving(critic, copied(trained, tmp_path / "adapters")) as (client, _),
        connected(client) as silent,
        connected(client, b"GET / HTTP/1.1\r\nHos") as half,
        connected(client, b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n") as idle,
        connected(client, unread_body) as refused,
        connected(client, b"GET / HTTP/1.1\r\nX: ") as slow,
    ):
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                time.sleep(0.1)
                slow.sendall(b"x")
            pytest.fail("a head may take longer than all of it")
        assert received(silent) == received(half) == b""
        assert received(idle).startswith(b"HTTP/1.1 200 ")
        assert received(refused).startswith(b"HTTP/1.1 401 ")


def test_silent_ones_lock_nobody_out(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    slow_body = POST + b"Content-Length: 100\r\n\r\n{"
    with (
        serving(critic, adapters, connections=5, batch_rows=1) as (client, server),
        contextlib.ExitStack() as stack,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=client.base_url) as other,
    ):
        with server.base.passing:
            asked = pool.submit(ask, client, "a0", ["good"] * 3)
            until(server.engine.waiting)
            for content in (b"", b"GET / HT", slow_body) * 5:
                stack.enter_context(connected(client, content))
            assert other.get("/v1/models").status_code == 200
        assert asked.result().status_code == 200
        assert ask(other, "a1").status_code == 200


def test_answers_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, critics: Serving) -> None:
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "LARGEST_HEAD", 2**20)
    client, _ = critics
    # More than the system keeps between two ends.
    count = 5 * 10**7 // len(client.get("/openapi.json").content)
    with connected(client, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * count) as connection:
        time.sleep(3)
        assert received(connection).count(b"HTTP/1.1 200 ") < count
    assert client.get("/health").status_code == 200
