"""OpenAI's interface: neutral fields, lists of prompts, log-probabilities, and what a key sees and spends."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from openai import BadRequestError, OpenAI

from dvora.serve.server import Server
from tests.serve.served import PROMPTS, Alone, Serving, complete, copied, serving

COMPLETION = {"model": "a0", "prompt": "the ", "max_tokens": 2, "temperature": 0}
CHAT = {"model": "a0", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
NEUTRAL: dict[str, list[object]] = {
    "n": [1],
    "user": ["someone"],
    "metadata": [{"a": "b"}],
    "store": [False, True],
    "service_tier": ["auto", "default"],
    "safety_identifier": ["x"],
    "prompt_cache_key": ["x"],
    "logit_bias": [{}],
    "frequency_penalty": [0, 0.0],
    "presence_penalty": [0, 0.0],
    "logprobs": [False],
    "stop": [[], "~"],
    "seed": [0],
    "top_p": [1, 1e-300],
    "stream_options": [{}, {"include_usage": False}],
}
OF_COMPLETIONS: dict[str, list[object]] = {"best_of": [1], "echo": [False], "suffix": [""]}
OF_CHATS: dict[str, list[object]] = {
    "top_logprobs": [0],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none"],
    "parallel_tool_calls": [True],
    "reasoning_effort": ["medium"],
    "verbosity": ["medium"],
    "max_completion_tokens": [2],
    "modalities": [["text"]],
}


@pytest.fixture
def http(writers: Serving) -> httpx.Client:
    return writers[0]


@pytest.fixture
def client(http: httpx.Client) -> OpenAI:
    return OpenAI(base_url=f"{http.base_url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize(
    ("path", "body", "neutral"),
    [("/v1/completions", COMPLETION, OF_COMPLETIONS), ("/v1/chat/completions", CHAT, OF_CHATS)],
)
def test_neutral_values_change_nothing(
    http: httpx.Client, path: str, body: dict[str, object], neutral: dict[str, list[object]]
) -> None:
    expected = [choice["index"] for choice in http.post(path, json=body).json()["choices"]]
    for name, values in {**NEUTRAL, **neutral}.items():
        for value in (*values, None):
            answer = http.post(path, json={**body, name: value})
            assert answer.status_code == 200, (name, value, answer.text)
            assert [choice["index"] for choice in answer.json()["choices"]] == expected
    assert http.post("/v1/embeddings", json={"model": "a0", "input": "a", "user": "x"}).status_code == 400


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 2}, "n: expected 1"),
        ({"logit_bias": {"5": 1}}, "logit_bias: expected {}"),
        ({"presence_penalty": 0.5}, "presence_penalty: expected 0"),
        ({"tools": [{"type": "function"}]}, "tools: expected []"),
        (
            {"response_format": {"type": "json_object"}},
            'response_format: expected {"type": "text"}',
        ),
        ({"unheard_of": 1}, "unheard_of is not kept here, leave it out; expected user, metadata"),
        ({"top_logprobs": 2}, "send logprobs: true too"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected a number of tokens from 0 to 20"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "judge", "content": "a"}]}, "messages.1: expected"),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            "messages.0: expected 1 to 1,024 objects",
        ),
    ],
)
def test_what_is_not_neutral_is_refused_by_name(http: httpx.Client, change: dict[str, object], words: str) -> None:
    answer = http.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_list_of_prompts(client: OpenAI, llama: Path, language_adapters: Path) -> None:
    alone, prompts = Alone(llama), list(PROMPTS)
    expected = [alone.continued(language_adapters / "a2", prompt, 9) for prompt in prompts]
    tokens = [alone.tokenizer(prompt)["input_ids"] for prompt in prompts]
    options: dict[str, Any] = {"model": "a2", "max_tokens": 9, "temperature": 0}
    for prompt in (prompts, tokens):
        whole = client.completions.create(prompt=prompt, **options)
        assert [choice.index for choice in whole.choices] == list(range(len(prompts)))
        assert [choice.text for choice in whole.choices] == expected
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == sum(map(len, tokens))
        assert whole.usage.completion_tokens <= 9 * len(prompts)
    texts, order, usage = [""] * len(prompts), [], None
    with client.completions.create(
        prompt=prompts, stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        for piece in stream:
            usage = piece.usage
            for choice in piece.choices:
                texts[choice.index] += choice.text
                order.append(choice.index)
    assert texts == expected
    # Interleaved.
    assert order != sorted(order)
    assert usage == whole.usage


def test_a_chat_is_sent_back_with_its_answer(client: OpenAI, llama: Path, language_adapters: Path) -> None:
    alone = Alone(llama)
    chat = client.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    answer = {**chat.choices[0].message.model_dump(), "content": "a"}
    messages = [{"role": "developer", "content": [{"type": "text", "text": "b"}]}, *CHAT["messages"], answer]  # type: ignore[misc]
    again = client.chat.completions.create(**{**CHAT, "messages": messages})  # type: ignore[call-overload]
    plain = [{"role": "system", "content": "b"}, *CHAT["messages"], {"role": "assistant", "content": "a"}]  # type: ignore[misc]
    prompt = alone.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert again.choices[0].message.content == alone.continued(language_adapters / "a0", prompt, 2)


def test_log_probabilities(client: OpenAI, llama: Path, language_adapters: Path) -> None:
    alone = Alone(llama)
    ids = alone.tokenizer("the ", return_tensors="pt")["input_ids"]
    text = alone.continued(language_adapters / "a1", "the ", 5)
    tokens = alone.tokenizer("the " + text)["input_ids"]
    with torch.no_grad():
        logits = alone.merged(language_adapters / "a1", None)(input_ids=torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)[ids.shape[1] - 1 : -1]
    options: dict[str, Any] = {"model": "a1", "max_tokens": 5, "temperature": 0}

    logprobs = client.completions.create(prompt="the ", logprobs=3, **options).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list(text)
    assert logprobs.text_offset == list(range(5))
    assert logprobs.token_logprobs == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)
    assert logprobs.top_logprobs is not None
    for row, likeliest in zip(logprobs.top_logprobs, expected.topk(3).values, strict=True):
        assert sorted(row.values(), reverse=True) == pytest.approx(likeliest.tolist(), abs=1e-4)

    messages: Any = [{"role": "user", "content": "hi"}]
    chat: dict[str, Any] = {"messages": messages, "logprobs": True, "top_logprobs": 2, **options}
    choice = client.chat.completions.create(**chat).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:
        assert token.bytes == list(token.token.encode())
        assert token.top_logprobs[0].logprob == token.logprob >= token.top_logprobs[1].logprob
    streamed = [
        token
        for piece in client.chat.completions.create(stream=True, **chat)
        for token in (piece.choices[0].logprobs.content if piece.choices[0].logprobs else None) or []
    ]
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]
    plain = client.chat.completions.create(messages=messages, logprobs=True, **options).choices[0].logprobs
    assert plain is not None
    assert plain.content is not None
    assert not plain.content[0].top_logprobs


@pytest.fixture
def tenants(llama: Path, language_adapters: Path, tmp_path: Path) -> Iterator[tuple[httpx.Client, Server]]:
    """Of two tenants one sees a1 and a2 and may have 40 tokens a minute; the other sees all, and the base."""
    keys = tmp_path / "keys.toml"
    shop, firm = (hashlib.sha256(name.encode()).hexdigest() for name in ("shop-secret", "firm-secret"))
    keys.write_text(
        f'[shop]\nsha256 = "{shop}"\nadapters = ["a[12]"]\ntokens = 40\n[firm]\nsha256 = "{firm}"\nadapters = ["*"]\n'
    )
    with serving(llama, copied(language_adapters, tmp_path / "adapters"), keys=keys) as pair:
        yield pair


def test_what_is_read_and_generated_is_spent(tenants: tuple[httpx.Client, Server]) -> None:
    client, _ = tenants
    client.headers["Authorization"] = "Bearer shop-secret"
    assert complete(client, "a1", "the ", 20).status_code == 200
    assert client.get("/v1/models").status_code == 200
    # A stream, and a list of prompts: 24 tokens before, 12 and more by this.
    body = {**COMPLETION, "model": "a1", "prompt": ["the ", "the "], "max_tokens": 10, "stream": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    answer = complete(client, "a1", "the ", 20)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert json.loads(answer.text)["error"]["type"] == "rate_limit_exceeded"


def test_openais_client_reads_our_errors(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="best_of: expected 1"):
        client.completions.create(model="a0", prompt="the ", best_of=3)
