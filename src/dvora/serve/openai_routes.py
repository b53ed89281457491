"""OpenAI's routes: models, completions, chat completions with streaming, embeddings. What is not kept is refused."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import starmap
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from pydantic import Field
from pydantic_core import to_json

from .answers import (
    Body,
    Call,
    Here,
    Inputs,
    Row,
    Switch,
    answer,
    error_body,
    headers_of,
    inputs_of,
    sent,
    takes,
    whose,
)
from .registry import Version
from .requests import Answer, Chance, Finish, Piece, RefusedError, Sampling
from .server import Server
from .texts import Text

router = APIRouter(tags=["OpenAI's interface"])
MOST_MESSAGES = 1024
NEUTRAL = dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"))
PLAIN = {"n": (1,), "logit_bias": ({},), "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0)}
Model = Annotated[str, Field(max_length=512, description="the name of a model, as GET /v1/models has it")]
Tokens = Annotated[int, Field(ge=1, lt=2**31, description="a number of tokens, 1 or more")]
Stop = Annotated[str, Field(max_length=256)]


class StreamOptions(Body, neutral={"include_obfuscation": None}):
    """What a stream has besides the text."""

    include_usage: bool = False


class Generation(Body, neutral={**NEUTRAL, **PLAIN}):
    """What completions and chats have in common."""

    model: Model
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    seed: int | None = Field(None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] = Field(
        [], description="at most 4 texts of up to 256 characters, or one"
    )
    stream: Switch = False
    stream_options: StreamOptions = Field(StreamOptions(), description='{"include_usage": true} or false')

    def sampling(self, max_tokens: int, chances: int | None) -> Sampling:
        """How tokens are chosen."""
        stop = tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, stop, chances)


class Completion(Generation, neutral={"best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,)}):
    """Of /v1/completions."""

    prompt: Inputs
    max_tokens: Tokens = 16
    logprobs: int | None = Field(None, ge=0, le=5, description="a number of tokens from 0 to 5")


class Part(Body):
    """Of a message."""

    type: Literal["text"]
    text: str


class Message(Body, neutral={"annotations": ([],), "tool_calls": ([],), "tool_call_id": None}):
    """Of a chat; an answer of ours can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As templates read it, which know no developers."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **({} if self.name is None else {"name": self.name})}


class Chat(
    Generation,
    neutral={
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "functions": ([],),
        "tool_choice": ("none", "auto"),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True,),
        "modalities": (["text"],),
        "reasoning_effort": ("none", "medium"),
        "verbosity": ("medium",),
    },
):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] = Field(
        description=f"1 to {MOST_MESSAGES:,} objects with role (system, developer, user, assistant or tool), content "
        '(a text, or a list of {"type": "text", "text": ...}) and perhaps name'
    )
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: Switch = False
    top_logprobs: int = Field(0, ge=0, le=20, description="a number of tokens from 0 to 20")


class Embeddings(Body, neutral=NEUTRAL):
    """Of /v1/embeddings."""

    model: Model
    input: Inputs
    encoding_format: Literal["float", "base64"] = Field("float", description="'float' or 'base64'")


@router.get("/v1/models")
async def models(call: Here) -> Response:
    """The base, and every adapter with the base as its parent."""

    def content(versions: Sequence[Version]) -> dict[str, Any]:
        models = [*([None] if call.key.sees(None) else []), *versions]
        return {"object": "list", "data": [_card(call.server.base.name, model) for model in models]}

    return answer(call.server.registry.listed("models", call.key, content))


@router.get("/v1/models/{model}")
async def model_card(model: str, call: Here) -> Response:
    """One model."""
    name = call.named(model)
    async with call.server.versions([name]) as versions:
        return answer(_card(call.server.base.name, versions[name]))


@router.post("/v1/completions", openapi_extra=takes(Completion))
async def completions(body: Annotated[Completion, sent(Completion)], call: Here) -> Response:
    """Continue a text, or each of several."""
    call.check(len(prompts := inputs_of(body.prompt)))
    return await _generate(
        call, body, lambda queue: call.server.texts.read(prompts, queue), body.max_tokens, body.logprobs
    )


@router.post("/v1/chat/completions", openapi_extra=takes(Chat))
async def chat_completions(body: Annotated[Chat, sent(Chat)], call: Here) -> Response:
    """Answer a chat, written with the tokenizer's template."""
    if body.top_logprobs and not body.logprobs:
        raise RefusedError(400, "top_logprobs stand beside those of the text; send logprobs: true too")
    messages, most = [message.plain() for message in body.messages], body.max_completion_tokens or body.max_tokens
    chances = body.top_logprobs if body.logprobs else None
    return await _generate(call, body, lambda queue: call.server.texts.chat(messages, queue), most, chances)


@router.post("/v1/embeddings", openapi_extra=takes(Embeddings))
async def embeddings(body: Annotated[Embeddings, sent(Embeddings)], call: Here) -> Response:
    """Vectors of length one for texts."""
    rows = await call.rows("embed", [body.model], inputs_of(body.input))

    def item(index: int, row: Row) -> dict[str, Any]:
        vector = row.values.numpy()
        is_base64 = body.encoding_format == "base64"
        values = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
        return {"object": "embedding", "index": index, "embedding": values, **whose(row.version)}

    count = sum(row.tokens for row in rows)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return await call.answer_rows(rows, item, object="list", model=body.model, usage=usage)


async def _generate(
    call: Call,
    body: Generation,
    read: Callable[[str], Awaitable[list[Text]]],
    most: int | None,
    chances: int | None,
) -> Response:
    """Continue texts that are read when it is clear that they may be, by at most so many tokens."""
    server = call.server
    server.require("generate")
    name = call.named(body.model)
    client = call.client()
    texts = await client.wait(read(call.key.queue_of(name)))
    room = server.longest - max(len(text.tokens) for text in texts)
    if (most or 0) > room:
        raise RefusedError(
            400,
            f"the prompt has {server.longest - room:,} tokens and {most:,} are to follow, and {server.base.name} "
            f"takes {server.longest:,} in all; ask for {room:,} or fewer",
        )
    rows, sampling = [(name, text) for text in texts], body.sampling(most or room, chances)
    # Until the last piece is sent, or nobody wants it.
    held = call.request.state.held.enter_async_context
    versions, parts = await held(server.asking("generate", rows, client, sampling))
    shape = _Shape(body, texts, versions[0], server, chances is not None)
    if not body.stream:
        return answer(await shape.whole(parts), versions)
    events = shape.events(parts, body.stream_options.include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers_of(versions))


class _Shape:
    """The JSON of the continuations that a request gets, whole or in pieces."""

    def __init__(
        self, body: Generation, texts: Sequence[Text], version: Version | None, server: Server, has_chances: bool
    ) -> None:
        self.is_chat, self.has_chances, self.token = isinstance(body, Chat), has_chances, server.texts.token
        self.prompt_tokens, self.generated = sum(len(text.tokens) for text in texts), 0
        self.offsets = [0] * len(texts)
        """Where the next token of each text begins."""
        self.kind = "chat.completion" if self.is_chat else "text_completion"
        self.common = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": whose(version)["digest"],
        }

    async def whole(self, parts: AsyncIterator[tuple[int, Piece | Answer]]) -> dict[str, Any]:
        texts, chances = [""] * len(self.offsets), [list[Chance]() for _ in self.offsets]
        choices = [dict[str, Any]() for _ in self.offsets]
        async for index, part in parts:
            text, likely, finish = self.taken(part)
            texts[index] += text
            chances[index] += likely
            if finish is not None:
                text = texts[index]
                content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
                choices[index] = self.choice(index, content, chances[index], finish)
        return {**self.common, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def events(self, parts: AsyncIterator[tuple[int, Piece | Answer]], with_usage: bool) -> AsyncIterator[bytes]:
        """As it comes; an error that comes after the first event is one too."""
        common = {**self.common, "object": "chat.completion.chunk" if self.is_chat else self.kind}
        begun = set[int]()
        try:
            async for index, part in parts:
                text, chances, finish = self.taken(part)
                delta = {} if index in begun else {"role": "assistant"}
                if not (text or chances or finish or delta):
                    continue
                if text or delta:
                    delta["content"] = text
                begun.add(index)
                content = {"delta": delta} if self.is_chat else {"text": text}
                yield _event({**common, "choices": [self.choice(index, content, chances, finish)]})
        except RefusedError as refusal:
            yield _event(error_body(refusal))
            return
        if with_usage:
            yield _event({**common, "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def taken(self, part: Piece | Answer) -> tuple[str, list[Chance], Finish | None]:
        """What is new: text, log-probabilities, and how the text ended."""
        if isinstance(part, Answer):
            return "", [], part.finish
        self.generated += 1
        return part.text, [] if part.chance is None else [part.chance], None

    def choice(self, index: int, content: dict[str, Any], chances: Sequence[Chance], finish: str | None) -> Any:
        """One text, or a piece of it."""
        logarithms: dict[str, Any] | None = None
        if self.has_chances and self.is_chat:
            tokens = [
                {**self.entry(chance.token, chance.logarithm), "top_logprobs": [*starmap(self.entry, chance.likeliest)]}
                for chance in chances
            ]
            logarithms = {"content": tokens, "refusal": None}
        elif self.has_chances:
            logarithms = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for chance in chances:
                token = self.token(chance.token)
                likeliest = [*chance.likeliest, (chance.token, chance.logarithm)]
                logarithms["tokens"].append(token)
                logarithms["token_logprobs"].append(chance.logarithm)
                logarithms["top_logprobs"].append({self.token(other): value for other, value in likeliest})
                logarithms["text_offset"].append(self.offsets[index])
                self.offsets[index] += len(token)
        return {"index": index, **content, "logprobs": logarithms, "finish_reason": finish}

    def entry(self, token: int, logarithm: float) -> dict[str, Any]:
        """A token of a chat; one that is a part of a letter has no bytes of its own."""
        text = self.token(token)
        return {"token": text, "logprob": logarithm, "bytes": None if "\ufffd" in text else [*text.encode()]}

    def usage(self) -> dict[str, int]:
        read, generated = self.prompt_tokens, self.generated
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"


def _card(base: str, version: Version | None) -> dict[str, Any]:
    name, root, parent = (base, base, None) if version is None else (version.name, version.digest or version.name, base)
    return {"id": name, "object": "model", "created": 0, "owned_by": "dvora", "root": root, "parent": parent}
