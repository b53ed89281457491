"""OpenAI's routes: models, completions, chat completions with streaming, embeddings. What is not kept is refused."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field
from starlette.types import Receive, Scope, Send

from .answers import Body, digest_of, error_body, headers_of, listening, rows_of, server_of
from .keys import asking
from .requests import Answer, Piece, RefusedError, Sampling
from .server import Server, Text

router = APIRouter(tags=["OpenAI's interface"])
MOST_STOPS = 4


class StreamOptions(Body):
    """What a stream has besides the text."""

    include_usage: bool = False


class Generation(Body):
    """What completions and chats have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Of OpenAI's other fields what means nothing.
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
    logit_bias: None = None

    def sampling(self, max_tokens: int) -> Sampling:
        """How tokens are chosen."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(stops):
            raise RefusedError(400, "stop has an empty text; leave it out")
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, stops)


class Completion(Generation):
    """Of /v1/completions."""

    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1)
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    suffix: None = None


class Part(Body):
    """Of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """Of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As templates read it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **({} if self.name is None else {"name": self.name})}


class Chat(Generation):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = False
    top_logprobs: None = None
    response_format: None = None
    tools: None = None
    tool_choice: None = None


class Embeddings(Body):
    """Of /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The base, and every adapter with the base as its parent."""
    server = server_of(request)
    base = _card(server.base.name, server.base.source, None)
    adapters = [_card(version.name, version.digest, server.base.name) for version in server.registry.versions()]
    return {"object": "list", "data": [base, *adapters]}


@router.get("/v1/models/{model}")
async def model_card(model: str, request: Request) -> dict[str, Any]:
    """One model."""
    server = server_of(request)
    if (name := server.registry.named(model, await asking(request))) is None:
        return _card(server.base.name, server.base.source, None)
    version = next(version for version in server.registry.versions() if version.name == name)
    return _card(version.name, version.digest, server.base.name)


@router.post("/v1/completions")
async def completions(body: Completion, request: Request) -> Response:
    """Continue a text."""
    server = server_of(request)
    server.require("generate")
    text = server.text(body.prompt, room=1)
    return await _generate(request, body, text, _room(server, text, body.max_tokens), is_chat=False)


@router.post("/v1/chat/completions")
async def chat_completions(body: Chat, request: Request) -> Response:
    """Answer a chat, written with the tokenizer's template."""
    server = server_of(request)
    server.require("generate")
    tokenizer = server.base.tokenizer
    if not tokenizer.chat_template:
        raise RefusedError(400, f"the tokenizer of {server.base.name} has no chat template; use /v1/completions")
    messages = [message.plain() for message in body.messages]
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of the template, which is the model's and raises what it likes
        raise RefusedError(400, f"the chat template refuses these messages: {error}") from error
    text = server.text(prompt, room=1, is_template=True)
    most = body.max_completion_tokens or body.max_tokens or server.longest - len(text.tokens)
    return await _generate(request, body, text, _room(server, text, most), is_chat=True)


@router.post("/v1/embeddings")
async def embeddings(body: Embeddings, request: Request) -> Response:
    """Vectors of length one for texts."""
    is_one = isinstance(body.input, str) or all(isinstance(token, int) for token in body.input)
    rows = await rows_of(request, "embed", [body.model], [body.input] if is_one else body.input)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(row.values.numpy(), body.encoding_format)}
        for index, row in enumerate(rows)
    ]
    count = sum(row.tokens for row in rows)
    usage = {"prompt_tokens": count, "total_tokens": count}
    content = {"object": "list", "model": body.model, "data": data, "usage": usage}
    return JSONResponse(content, headers=headers_of(row.version for row in rows))


def _room(server: Server, text: Text, wanted: int) -> int:
    """How many tokens may follow a prompt.

    Raises:
        RefusedError: 400, there is no room for as many as are asked for.
    """
    room = server.longest - len(text.tokens)
    if wanted > room:
        raise RefusedError(
            400,
            f"the prompt has {len(text.tokens):,} tokens and {wanted:,} are to follow, and {server.base.name} takes "
            f"{server.longest:,} in all; ask for {room:,} or fewer",
        )
    return wanted


async def _generate(request: Request, body: Generation, text: Text, max_tokens: int, *, is_chat: bool) -> Response:
    server = server_of(request)
    name = server.registry.named(body.model, await asking(request))
    async with AsyncExitStack() as held:
        gone = await held.enter_async_context(listening(request))
        version, parts = await held.enter_async_context(server.generation(name, text, body.sampling(max_tokens), gone))
        headers = headers_of([version])
        shape = _Shape(body.model, is_chat, len(text.tokens), digest_of(version))
        if not body.stream:
            texts, tokens, finish = [], 0, None
            async for part in parts:
                if isinstance(part, Piece):
                    texts.append(part.text)
                    tokens = part.tokens
                else:
                    finish = part.finish
            return JSONResponse(shape.whole("".join(texts), finish, tokens), headers=headers)
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        # Held until the last piece is sent.
        return _Stream(_events(shape, parts, with_usage), held.pop_all(), headers)


class _Stream(StreamingResponse):
    """Events, and what is held until they are sent, or nobody wants them."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack, headers: Mapping[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._held:
            await super().__call__(scope, receive, send)


class _Shape:
    """The JSON of one completion, whole or in pieces."""

    def __init__(self, model: str, is_chat: bool, prompt_tokens: int, digest: str) -> None:
        self.is_chat, self.prompt_tokens = is_chat, prompt_tokens
        self.common = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": digest,
        }

    def whole(self, text: str, finish: str | None, tokens: int) -> dict[str, Any]:
        """All of it."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.common, "object": kind, "choices": [choice], "usage": self.usage(tokens)}

    def piece(self, text: str, finish: str | None = None, *, is_first: bool = False) -> dict[str, Any]:
        """A part of it."""
        delta = {**({"role": "assistant"} if is_first else {}), **({"content": text} if text or is_first else {})}
        content = {"delta": delta} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.common, "object": kind, "choices": [choice]}

    def usage(self, tokens: int) -> dict[str, int]:
        """How many tokens it took."""
        total = self.prompt_tokens + tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}


async def _events(shape: _Shape, parts: AsyncIterator[Piece | Answer], with_usage: bool) -> AsyncIterator[str]:
    """A completion as events; an error that comes after the first one is an event too."""
    tokens, is_first = 0, True
    try:
        async for part in parts:
            if isinstance(part, Piece):
                tokens = part.tokens
                if part.text or is_first:
                    yield _event(shape.piece(part.text, is_first=is_first))
                    is_first = False
            else:
                yield _event(shape.piece("", part.finish))
    except RefusedError as refusal:
        yield _event(error_body(refusal.message, refusal.kind))
        return
    if with_usage:
        yield _event({**shape.piece(""), "choices": [], "usage": shape.usage(tokens)})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _encoded(vector: Any, encoding: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


def _card(name: str, root: str | None, parent: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "dvora", "root": root or name, "parent": parent}
