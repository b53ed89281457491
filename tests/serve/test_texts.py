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
from tests.serve.served import Serving, complete, copied, serving

MANY_VALUES = ("null", "[]", "{}", '""', "1", "1.5", '["",""]', '{"role":"user","content":1}')
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


@pytest.mark.parametrize("field", ["prompt", "stop", "model", "temperature", "logit_bias", "other"])
def test_bodies_of_many_values_cost_little(writers: Serving, field: str) -> None:
    client, _ = writers
    others = "".join(f'"{name}":"a0",' for name in ("model", "prompt") if name != field)
    for value in MANY_VALUES:
        started = time.process_time()
        answer = post(client, "/v1/completions", f'{{{others}"{field}":{full(value)}}}')
        check_problem(answer, time.process_time() - started)


def test_chats_and_texts_of_many_values_cost_little(writers: Serving, judges: Serving) -> None:
    names = "{" + ",".join(f'"{number:x}":0' for number in range(LARGEST_JSON // 10)) + "}"
    bodies = [(writers, "/v1/chat/completions", names)]
    for messages in (f"[{names}]", full("{}"), full('{"role":"user","content":1}')):
        bodies.append((writers, "/v1/chat/completions", f'{{"model":"a0","messages":{messages}}}'))
    for value in ("null", "1", '["",""]'):
        for path, field in (("/v1/classify", "input"), ("/predict", "inputs"), ("/embed", "inputs")):
            bodies.append((judges, path, f'{{"model":"two","{field}":{full(value)}}}'))
    for (client, _), path, body in bodies:
        started = time.process_time()
        answer = post(client, path, body)
        check_problem(answer, time.process_time() - started)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model":"a0","prompt":"\\ud800"}', "JSON"),
        ('{"model":"\\ud800","prompt":"a"}', "JSON"),
        ('{"model":"a\\u0000","prompt":"a"}', "no model 'a\\\\x00'"),
        ('{"model":"a0","prompt":"a","stop":["\\udfff"]}', "JSON"),
        ('{"\\ud800":1}', "JSON"),
        ('{"model":"a0","prompt":"a","temperature":1e400}', "temperature: expected a number from 0 to 2"),
        ('{"model":"a0","prompt":"a","temperature":NaN}', "temperature"),
        ('{"model":"a0","prompt":"a","temperature":true}', "temperature"),
        ('{"model":"a0","prompt":"a","top_p":0}', "top_p: expected a number above 0, at most 1"),
        ('{"model":"a0","prompt":"a","top_p":1e-400}', "top_p"),
        ('{"model":"a0","prompt":"a","seed":-1}', "seed"),
        ('{"model":"a0","prompt":"a","max_tokens":true}', "max_tokens"),
        (f'{{"model":"a0","prompt":"a","max_tokens":1{"0" * 400}}}', "max_tokens"),
        (f'{{"model":"a0","prompt":"a","max_tokens":1{"0" * 5000}}}', "JSON"),
        ('{"model":"a0","prompt":[true]}', "prompt"),
        ('{"model":"a0","prompt":[99999999999999999999]}', "a token is not from 0 to"),
        ('{"model":"a0","prompt":[]}', "0 rows"),
        ('{"model":"a0","prompt":[[]]}', "no tokens"),
        ('{"model":"a0","prompt":null}', "prompt: expected a text"),
        (
            f'{{"model":"a0","prompt":"a","stop":"{"x" * 1000}"}}',
            "stop: expected at most 4 texts of up to 256 characters",
        ),
        ('{"model":"a0","prompt":"a","stream_options":{"usage":true}}', "stream_options: usage is not kept here"),
        ("[" * 30_000, "JSON"),
        ("", "JSON"),
        ("null", "JSON"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(writers: Serving, content: str, words: str) -> None:
    client, _ = writers
    answer = post(client, "/v1/completions", content)
    assert answer.status_code == (404 if "no model" in words else 400), answer.text
    assert words in answer.text
    assert not any(word in answer.text for word in NO_WORDS_OF_HTTP), answer.text


def test_only_what_is_no_text_is_counted(writers: Serving) -> None:
    client, _ = writers
    text = '{"a": [1, "\\\\"], ' * 50_000
    for prompt, words in ((text, "characters"), ([text[:40_000]] * 60, "tokens"), ([["x"]] * 40_000, "parts")):
        answer = client.post("/v1/completions", json={"model": "a0", "prompt": prompt})
        assert words in answer.json()["error"]["message"]
    started = time.process_time()
    check_problem(post(client, "/v1/completions", '"' + '\\"[' * 1_300_000), time.process_time() - started)


def test_a_page_of_another_site_cannot_send_a_body(writers: Serving) -> None:
    client, _ = writers
    body = '{"model": "a0", "prompt": "a", "max_tokens": 1}'
    for kind, status in (("text/plain", 400), ("application/json; charset=utf-8", 200)):
        assert client.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == status


def test_a_text_that_cannot_fit_is_not_read(writers: Serving, judges: Serving) -> None:
    (client, _), (classifying, _) = writers, judges
    text = "ab " * (LARGEST_JSON // 3 - 100)
    started = time.process_time()
    answers = [
        complete(client, "a0", text),
        client.post("/v1/chat/completions", json={"model": "a0", "messages": [{"role": "user", "content": text}]}),
        classifying.post("/v1/classify", json={"model": "two", "input": text}),
    ]
    for answer in answers:
        assert answer.status_code == 400
        assert f"at most {MANY:,} are read" in answer.json()["error"]["message"]
    cut = classifying.post("/v1/classify", json={"model": "two", "input": "good " + text, "truncate": True})
    assert cut.status_code == 200
    assert time.process_time() - started < 3


def test_a_query_is_read_for_each_text_within_bounds(judges: Serving) -> None:
    client, _ = judges
    body = {"model": "one", "query": "good " * 10_000, "texts": ["bad"] * 1000, "truncate": True}
    answer = client.post("/rerank", json=body)
    assert answer.status_code == 400
    assert "the texts have 50,003,000 characters" in answer.json()["error"]["message"]


def test_short_texts_do_not_wait_for_long_ones(writers: Serving) -> None:
    _, server = writers
    texts, order = Texts(server.base, 2**22), list[str]()

    async def read(name: str, text: str) -> None:
        await texts.read([text], "")
        order.append(name)

    async def several() -> None:
        await asyncio.gather(read("long", "a b" * 50_000), read("other", "a b" * 50_000), read("short", "the book"))

    asyncio.run(several())
    texts.close()
    assert order == ["short", "long", "other"]


def test_one_time_for_the_whole_request(llama: Path, language_adapters: Path, tmp_path: Path) -> None:
    """Sixty steps of which each alone is in time."""
    body = {"model": "a0", "prompt": "the ", "max_tokens": 60, "temperature": 0}
    with serving(llama, copied(language_adapters, tmp_path / "adapters")) as (client, server):
        assert client.post("/v1/completions", json=body).status_code == 200
        started = time.monotonic()
        client.post("/v1/completions", json=body)
        # Settings are frozen; this is what the option sets.
        object.__setattr__(server.settings, "timeout", (time.monotonic() - started) / 4)
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout"
        stream = client.post("/v1/completions", json={**body, "stream": True}).text
        assert "timeout" in stream
        assert "[DONE]" not in stream


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
