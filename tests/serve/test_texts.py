"""What a request may cost others: bodies, problems and texts are bounded, and long texts are not waited for."""

import asyncio
import os
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx
import pytest
from fastapi import FastAPI, Request

from dvora.serve.access import Key
from dvora.serve.bounds import LARGEST_JSON
from dvora.serve.calls import Call
from dvora.serve.requests import RefusedError
from dvora.serve.texts import MANY, Texts
from tests.serve.served import Serving, ask, copied, serving

MANY_VALUES = ("null", "[]", "{}", '""', "1", "1.5", '["",""]', '{"a":"b","c":1}')
NO_WORDS_OF_HTTP = ("constrained", "list[", "Classify", "str.", "Input should", "NoneType", "/tmp", "site-packages")


def post(client: httpx.Client, path: str, content: str | bytes) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": "application/json"})


def full(value: str) -> str:
    """As many of a value as a body may have."""
    return "[" + ",".join([value] * ((LARGEST_JSON - 1000) // (len(value) + 1))) + "]"


def check_problem(answer: httpx.Response, seconds: float) -> None:
    assert answer.status_code == 400, answer.text[:500]
    assert len(answer.content) < 1000
    assert not any(word in answer.text for word in NO_WORDS_OF_HTTP), answer.text
    # Of the processor: 9 where every null was a problem of its own.
    assert seconds < 3


@pytest.mark.parametrize(
    ("path", "field"),
    [
        *(("/v1/classify", field) for field in ("input", "model", "truncate", "abstain_below", "other")),
        *(("/predict", field) for field in ("inputs", "parameters")),
        ("/v1/embeddings", "input"),
    ],
)
def test_bodies_of_many_values_cost_little(critics: Serving, path: str, field: str) -> None:
    client, _ = critics
    others = "".join(f'"{name}":"a0",' for name in ("model", "input" + "s" * (path == "/predict")) if name != field)
    for value in MANY_VALUES:
        started = time.process_time()
        answer = post(client, path, f'{{{others}"{field}":{full(value)}}}')
        check_problem(answer, time.process_time() - started)


def test_objects_and_texts_of_many_values_cost_little(judges: Serving) -> None:
    client, _ = judges
    names = "{" + ",".join(f'"{number:x}":0' for number in range(LARGEST_JSON // 10)) + "}"
    bodies = [("/v1/classify", names), ("/v1/classify", f'{{"model":"two","input":[{names}]}}')]
    for value in ("null", "1", '["",""]'):
        for path, field in (("/v1/classify", "input"), ("/predict", "inputs"), ("/embed", "inputs")):
            bodies.append((path, f'{{"model":"two","{field}":{full(value)}}}'))
    for path, body in bodies:
        started = time.process_time()
        answer = post(client, path, body)
        check_problem(answer, time.process_time() - started)


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("/v1/classify", '{"model":"a0","input":"\\ud800"}', "JSON"),
        ("/v1/classify", '{"model":"\\ud800","input":"a"}', "JSON"),
        ("/v1/classify", '{"model":"a\\u0000","input":"a"}', "no model 'a\\\\x00'"),
        ("/v1/classify", '{"model":"a0","input":["a","\\udfff"]}', "JSON"),
        ("/v1/classify", '{"\\ud800":1}', "JSON"),
        (
            "/v1/classify",
            '{"model":"a0","input":"a","abstain_below":1e400}',
            "abstain_below: expected a probability, 0 to 1",
        ),
        ("/v1/classify", '{"model":"a0","input":"a","abstain_below":NaN}', "abstain_below"),
        ("/v1/classify", '{"model":"a0","input":"a","abstain_below":true}', "abstain_below"),
        ("/v1/classify", '{"model":"a0","input":"a","abstain_below":-1}', "abstain_below"),
        ("/v1/classify", '{"model":"a0","input":"a","truncate":1}', "truncate: expected true or false"),
        ("/v1/classify", f'{{"model":"a0","input":"a","abstain_below":1{"0" * 400}}}', "abstain_below"),
        ("/predict", '{"model":"a0","inputs":"a","parameters":{"top_k":0}}', '"top_k", 1 or more'.replace('"', '\\"')),
        ("/predict", '{"model":"a0","inputs":"a","parameters":{"top_k":true}}', "parameters"),
        ("/predict", f'{{"model":"a0","inputs":"a","parameters":{{"top_k":1{"0" * 5000}}}}}', "JSON"),
        ("/predict", '{"model":"a0","inputs":"a","parameters":{"usage":true}}', "parameters: usage is not kept here"),
        ("/v1/embeddings", '{"model":"a0","input":[true]}', "input"),
        ("/v1/embeddings", '{"model":"a0","input":[99999999999999999999]}', "a token is not from 0 to"),
        ("/v1/embeddings", '{"model":"a0","input":[]}', "0 rows"),
        ("/v1/embeddings", '{"model":"a0","input":[[]]}', "no tokens"),
        ("/v1/embeddings", '{"model":"a0","input":null}', "input: expected a text"),
        ("/v1/classify", "[" * 30_000, "JSON"),
        ("/v1/classify", "", "JSON"),
        ("/v1/classify", "null", "JSON"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(critics: Serving, path: str, content: str, words: str) -> None:
    client, _ = critics
    answer = post(client, path, content)
    assert answer.status_code == (404 if "no model" in words else 400), answer.text
    assert words in answer.text
    assert not any(word in answer.text for word in NO_WORDS_OF_HTTP), answer.text


def test_only_what_is_no_text_is_counted(critics: Serving) -> None:
    client, _ = critics
    text = '{"a": [1, "\\\\"], ' * 50_000
    for given, words in ((text, "characters"), ([text[:40_000]] * 60, "tokens"), ([["x"]] * 40_000, "parts")):
        answer = client.post("/v1/classify", json={"model": "a0", "input": given})
        assert words in answer.json()["error"]["message"]
    started = time.process_time()
    check_problem(post(client, "/v1/classify", '"' + '\\"[' * 1_300_000), time.process_time() - started)


def test_a_page_of_another_site_cannot_send_a_body(critics: Serving) -> None:
    client, _ = critics
    body = '{"model": "a0", "input": "a"}'
    for kind, status in (("text/plain", 400), ("application/json; charset=utf-8", 200)):
        assert client.post("/v1/classify", content=body, headers={"content-type": kind}).status_code == status


def test_a_text_that_cannot_fit_is_not_read(judges: Serving) -> None:
    client, _ = judges
    text = "ab " * (LARGEST_JSON // 3 - 100)
    started = time.process_time()
    answers = [
        ask(client, "two", text),
        client.post("/v1/embeddings", json={"model": "two", "input": text}),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert f"at most {MANY:,} are read" in answer.json()["error"]["message"]
    cut = client.post("/v1/classify", json={"model": "two", "input": "good " + text, "truncate": True})
    assert cut.status_code == 200
    assert time.process_time() - started < 3


def test_a_query_is_read_for_each_text_within_bounds(judges: Serving) -> None:
    client, _ = judges
    body = {"model": "one", "query": "good " * 10_000, "texts": ["bad"] * 1000, "truncate": True}
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 400
    assert "the texts have 50,003,000 characters" in answer.json()["error"]["message"]


def test_short_texts_do_not_wait_for_long_ones(critics: Serving) -> None:
    _, server = critics
    texts, order = Texts(server.base, 2**22), list[str]()

    async def read(name: str, text: str) -> None:
        await texts.read([text], "")
        order.append(name)

    async def several() -> None:
        await asyncio.gather(read("long", "a b" * 50_000), read("other", "a b" * 50_000), read("short", "the book"))

    asyncio.run(several())
    texts.close()
    assert order == ["short", "long", "other"]


def test_one_time_for_the_whole_request(critic: Path, trained: Path, tmp_path: Path) -> None:
    """A thousand batches of which fifty are in time."""
    with serving(critic, copied(trained, tmp_path / "adapters"), batch_rows=1) as (client, server):
        assert ask(client, "a0").status_code == 200
        started = time.monotonic()
        assert ask(client, "a0", ["good"] * 50).status_code == 200
        # Settings are frozen; this is what the option sets.
        object.__setattr__(server.settings, "timeout", time.monotonic() - started)
        answer = ask(client, "a0", ["good"] * 1000)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout"


def test_who_waits_is_told_in_time() -> None:
    async def wait() -> None:
        ends = asyncio.Event()

        async def receive() -> dict[str, object]:
            await ends.wait()
            return {"type": "http.disconnect"}

        with ExitStack() as held:
            state = {"deadline": time.monotonic() + 0.05, "held": held}
            request = Request({"type": "http", "app": FastAPI(), "state": state}, receive)
            request.app.state.server = None
            call = Call(request, Key())
            await call.wait(asyncio.sleep(0.001))
            for _ in range(2):
                with pytest.raises(RefusedError, match="no answer came"):
                    await call.wait(asyncio.sleep(30))
            state["deadline"] += 60
            ends.set()
            with pytest.raises(RefusedError, match="has hung up"):
                await call.wait(asyncio.sleep(30))

    asyncio.run(wait())


def test_a_list_of_many_adapters_costs_little(bert: Path, classifiers: Path, tmp_path: Path) -> None:
    for number in range(1000):
        folder = tmp_path / "adapters" / f"tenant-{number}"
        folder.mkdir(parents=True)
        for file in (classifiers / "two").iterdir():
            os.link(file, folder / file.name)
    with serving(bert, tmp_path / "adapters") as (client, _):
        assert len(client.get("/v1/models").json()["data"]) == 1001
        started = time.process_time()
        for _ in range(10):
            client.get("/v1/models")
        # 0.3 where every card was encoded by itself and asked the disk for the base.
        assert time.process_time() - started < 0.15
