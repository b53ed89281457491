"""What every request passes: whose body is read, how much of it, for whom there is memory, and by which name."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

from dvora.serve import bounds
from dvora.serve.run import JsonLines
from tests.serve.served import ADMIN, copied, serving
from tests.serve.test_connections import HEAD, POST, connected


def test_which_bodies_are_read(critic: Path, trained: Path, tmp_path: Path) -> None:
    """None for a client that is not let in, for no route, or that says itself that it is too large."""
    token, waits = f"Authorization: {ADMIN['Authorization']}\r\n".encode(), b"Expect: 100-continue\r\n"
    with serving(critic, copied(trained, tmp_path / "adapters"), upload=2**23) as (client, _):
        for line, length, headers, status in (
            (b"PUT /v1/adapters/a0", 10**6, b"", b"401"),
            (b"POST /v1/nothing", 10**6, token, b"404"),
            (b"POST /health", 10**6, token, b"405"),
            (b"POST /v1/classify", bounds.LARGEST_JSON + 1, token, b"413"),
            (b"PUT /v1/adapters/a0", 2**23 + 1, token, b"413"),
            (b"PUT /v1/adapters/a0", bounds.LARGEST_JSON + 1, token, b"100"),
        ):
            head = line + b" HTTP/1.1\r\nContent-Length: %d\r\n" % length + HEAD + headers + waits + b"\r\n"
            with connected(client, head) as connection:
                assert connection.recv(2**16).startswith(b"HTTP/1.1 " + status), line
        large = client.put("/v1/adapters/a0", content=bytes(bounds.LARGEST_JSON + 1), headers=ADMIN)
        assert large.status_code == 422


def test_slow_bodies_give_way_to_others(critic: Path, trained: Path, tmp_path: Path) -> None:
    adapters = copied(trained, tmp_path / "adapters")
    slow = POST + b"Content-Length: 400000\r\n\r\n" + b" " * 300_000
    with (
        serving(critic, adapters, body_memory=10**6 / 2**20, upload=10**6) as (client, _),
        connected(client, slow) as first,
        connected(client, slow) as second,
        connected(client, slow) as third,
    ):
        time.sleep(0.5)
        assert embedded(client, 200_000).status_code == 200
        answer = first.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in answer.lower()
        for other in (second, third):
            other.sendall(b" " * 100_000)
            assert other.recv(2**16).startswith(b"HTTP/1.1 400 ")
        # What they held is free again.
        assert embedded(client, 900_000).status_code == 200
        assert embedded(client, 1_000_000).status_code == 503


def embedded(client: httpx.Client, letters: int) -> httpx.Response:
    """By a body with so many letters that change nothing."""
    return client.post("/v1/embeddings", json={"model": "a0", "input": "good", "user": "x" * letters})


def test_answers_are_counted(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    with serving(bert, copied(classifiers, tmp_path / "adapters"), body_memory=0.1, upload=10**5) as (client, _):
        for count, status in ((500, 503), (10, 200), (500, 503), (200, 200)):
            answer = client.post("/v1/embeddings", json={"model": "two", "input": ["a"] * count})
            assert answer.status_code == status, count
        assert len(answer.content) > bounds.PIECE
        assert len(answer.json()["data"]) == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LocalHost:1", 200),
        ("127.0.0.1", 200),
        ("10.1.2.3:80", 200),
        ("[::1]:80", 200),
        ("name.example", 200),
        ("Other.Name.Example:443", 200),
        ("elsewhere.example", 421),
        ("localhost.elsewhere.example", 421),
        ("localhost@elsewhere.example", 421),
        ("2130706433", 421),
        ("[localhost]", 400),
        ("", 400),
        ("a:b", 400),
        ("[::1", 400),
    ],
)
def test_hosts(host: str, status: int, server_of_names: httpx.Client) -> None:
    answer = server_of_names.get("/v1/models", headers={"Host": host})
    assert answer.status_code == status
    assert ("--allow-host" in answer.text) == (status == 421)


@pytest.fixture(scope="module")
def server_of_names(critic: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    adapters = copied(trained, tmp_path_factory.mktemp("names") / "adapters")
    with serving(critic, adapters, allow_host=("name.example", "*.Name.example")) as (client, _):
        yield client


def test_a_request_is_one_line_of_the_log(server_of_names: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dvora.serve")
    server_of_names.request("X" * 1000, '/v1/adapters/a%0A{"status":200}%E2%80%A8%1B')
    until = time.monotonic() + 10
    # It is written after the answer.
    while not (records := [record for record in caplog.records if record.name == "dvora.serve.access"]):
        assert time.monotonic() < until
    line = JsonLines().format(records[0])
    assert len(line) < 300
    assert line.isprintable()
    # By the version of Starlette.
    assert json.loads(line)["status"] in (400, 405)
