"""Many clients while adapters are replaced and deleted: every answer is its digest's, none another's or the base's."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dvora.serve.server import Server
from tests.bank.versions import until
from tests.serve.served import ADMIN, TEXTS, Alone, answer_of, ask, copied, probabilities, put, serving
from tests.serve.test_connections import POST, connected

CONTENTS = tuple(f"a{number}" for number in range(6))


def uploads_of(server: Server) -> set[str]:
    return {version.upload.name for version in server.registry.versions() if version.upload is not None}


def test_adapters_change_under_load(
    critic: Path, trained: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = 10_000 if request.config.getoption("--fuzz") else 300
    alone, draw = Alone(critic), random.Random(1)
    values = {name: (trained / name / "adapter_model.safetensors").read_bytes() for name in CONTENTS}
    tenants = [f"tenant{number}" for number in range(5)]
    jobs = [(draw.choice(tenants), draw.choice(TEXTS)) for _ in range(count)]
    is_done = threading.Event()
    with (
        serving(critic, copied(trained, tmp_path / "adapters"), slots=7) as (client, server),
        ThreadPoolExecutor(17) as pool,
    ):
        content_of = {client.get(f"/v1/adapters/{name}").json()["digest"]: name for name in CONTENTS}
        served: dict[str, set[str]] = {tenant: set() for tenant in tenants}

        for tenant in tenants:
            client.put(f"/v1/adapters/{tenant}", content=values["a0"], headers=ADMIN).raise_for_status()
            served[tenant].add("a0")

        def change() -> int:
            changes, choose = 0, random.Random(2)
            while not is_done.is_set():
                tenant = choose.choice(tenants)
                if choose.random() < 0.1:
                    assert client.delete(f"/v1/adapters/{tenant}", headers=ADMIN).status_code in (200, 404)
                else:
                    content = choose.choice(CONTENTS)
                    served[tenant].add(content)
                    answer = client.put(f"/v1/adapters/{tenant}", content=values[content], headers=ADMIN)
                    assert answer.status_code in (200, 201)
                changes += 1
            return changes

        changing = pool.submit(change)
        answers = list(pool.map(lambda job: ask(client, *job), jobs))
        is_done.set()
        changes = changing.result()
        # Every version that nobody uses has left, and its upload the disk.
        until(lambda: {path.name for path in server.store.folder.glob("[0-9a-f]*")} == uploads_of(server))
    answered = 0
    for (tenant, text), answer in zip(jobs, answers, strict=True):
        if answer.status_code == 404:
            continue
        content = content_of[answer.headers["x-dvora-digest"]]
        assert content in served[tenant]
        assert probabilities(answer) == alone.answer(trained / content, text)
        answered += 1
    assert answered > count / 2
    assert changes > 10


def test_who_hangs_up_frees_the_place(critic: Path, trained: Path, tmp_path: Path) -> None:
    body = json.dumps({"model": "a0", "input": ["good"] * 40}).encode()
    with serving(critic, copied(trained, tmp_path / "adapters"), batch_rows=1) as (client, server):

        def waiting() -> int:
            return len(server.engine.waiting())

        with server.base.passing:
            for _ in range(20):
                with connected(client, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body):
                    until(lambda: waiting() >= 39)
                until(lambda: not waiting())
        assert ask(client, "a1").status_code == 200
        until(lambda: all(version.users == 1 for version in server.registry.versions()))


def test_a_request_keeps_the_version_that_it_began_with(critic: Path, trained: Path, tmp_path: Path) -> None:
    alone = Alone(critic)
    with (
        serving(critic, copied(trained, tmp_path / "adapters"), batch_rows=1) as (client, server),
        ThreadPoolExecutor(1) as pool,
    ):
        with server.base.passing:
            begun = pool.submit(ask, client, "a0", [TEXTS[0]] * 3)
            until(lambda: len(server.engine.waiting()) == 2)
            assert put(client, "a0", trained / "a1").status_code == 200
        for row in begun.result().json()["data"]:
            assert row["probs"] == alone.answer(trained / "a0")
        assert answer_of(client, "a0") == alone.answer(trained / "a1")


def test_a_full_queue_is_429(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    with serving(bert, copied(classifiers, tmp_path / "adapters"), queue=3, batch_rows=1) as (client, _):
        body = {"model": "two", "input": ["good"] * 3}
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: client.post("/v1/classify", json=body), range(64)))
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        # What would not fit into an empty queue is not told to try again.
        assert client.post("/v1/classify", json={"model": "two", "input": ["good"] * 4}).status_code == 400
        assert client.post("/v1/classify", json=body).status_code == 200
