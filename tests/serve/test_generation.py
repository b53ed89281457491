"""Generated texts: under any load each is what its adapter's merged model gives alone."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.serve.served import ADMIN, PROMPTS, Alone, Serving, complete, copied, serving

MODELS = ("llama", *(f"a{number}" for number in range(6)))


def folder_of(adapters: Path, model: str) -> Path | None:
    return None if model == "llama" else adapters / model


def test_every_answer_under_mixed_load_is_that_of_the_merged_model_alone(
    llama: Path, language_adapters: Path, tmp_path: Path
) -> None:
    alone, draw = Alone(llama), random.Random(0)
    jobs = [(draw.choice(MODELS), draw.choice(PROMPTS), draw.randint(1, 20)) for _ in range(120)]
    with (
        serving(llama, copied(language_adapters, tmp_path / "adapters")) as (client, server),
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda job: complete(client, *job), jobs))
        digests = {model: server.base.bank.digest(model) for model in MODELS[1:]}
    texts = set()
    for (model, prompt, tokens), answer in zip(jobs, answers, strict=True):
        expected = alone.continued(folder_of(language_adapters, model), prompt, tokens)
        assert answer.json()["choices"][0]["text"] == expected
        assert answer.headers["x-dvora-digest"] == digests.get(model, "base")
        texts.add((prompt, tokens, expected))
    # Adapters that answered alike would prove nothing.
    assert len(texts) > 60


def test_a_text_keeps_the_version_that_it_began_with(llama: Path, language_adapters: Path, tmp_path: Path) -> None:
    alone = Alone(llama)
    old, new = (alone.continued(language_adapters / name, "the ", 40) for name in ("a0", "a1"))
    assert old != new
    body = {"model": "a0", "prompt": "the ", "max_tokens": 40, "temperature": 0, "stream": True}
    with serving(llama, copied(language_adapters, tmp_path / "adapters")) as (client, _):
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            values = (language_adapters / "a1" / "adapter_model.safetensors").read_bytes()
            assert client.put("/v1/adapters/a0", content=values, headers=ADMIN).status_code == 200
            assert complete(client, "a0", "the ", 40).json()["choices"][0]["text"] == new
            pieces = [json.loads(line[6:]) for line in (first, *lines) if line.startswith("data: {")]
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == old


def test_openais_client(llama: Path, language_adapters: Path, writers: Serving) -> None:
    alone = Alone(llama)
    http, _ = writers
    client = OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0)
    cards = {card.id: card for card in client.models.list()}
    assert {*cards} == {*MODELS}
    assert cards["a3"].parent == "llama"  # type: ignore[attr-defined]
    assert client.models.retrieve("a3").id == "a3"

    expected = alone.continued(language_adapters / "a2", "the ", 12)
    whole = client.completions.create(model="llama:a2", prompt="the ", max_tokens=12, temperature=0)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 12)
    pieces = client.completions.create(model="a2", prompt="the ", max_tokens=12, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected

    messages = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="a2", messages=messages, max_tokens=6, temperature=0)  # type: ignore[arg-type]
    prompt = alone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.choices[0].message.content == alone.continued(language_adapters / "a2", prompt, 6)
    parts = client.chat.completions.create(
        model="a2",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *said, last = list(parts)  # type: ignore[arg-type]
    assert "".join(part.choices[0].delta.content or "" for part in said) == chat.choices[0].message.content
    assert last.usage.completion_tokens == 6

    with pytest.raises(NotFoundError, match="no model 'a9'"):
        client.completions.create(model="a9", prompt="the ")
    with pytest.raises(BadRequestError, match="takes 64 in all"):
        client.completions.create(model="a2", prompt="the ", max_tokens=61)
    with pytest.raises(BadRequestError, match="echo"):
        client.completions.create(model="a2", prompt="the ", echo=True)


def test_sampling_is_the_seeds(writers: Serving) -> None:
    client, _ = writers

    def sampled(**options: object) -> str:
        answer = complete(client, "a1", "the ", 20, **{"temperature": 1.5, **options})
        text: str = answer.json()["choices"][0]["text"]
        return text

    assert sampled(seed=3) == sampled(seed=3)
    assert sampled(seed=3) != sampled(seed=4)
    # Nothing but the likeliest token is left.
    assert sampled(seed=3, top_p=1e-6) == sampled(temperature=0)


def test_stop_texts_end_a_text_and_are_no_part_of_it(llama: Path, language_adapters: Path, writers: Serving) -> None:
    text = Alone(llama).continued(language_adapters / "a1", "the ", 30)
    stop = text[7:10]
    client, _ = writers
    choice = complete(client, "a1", "the ", 30, stop=[stop, "never"]).json()["choices"][0]
    assert choice == {"index": 0, "text": text[: text.index(stop)], "logprobs": None, "finish_reason": "stop"}
