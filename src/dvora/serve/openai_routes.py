"""OpenAI's routes: models, completions, chat completions with streaming, embeddings. What is not kept is refused."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from itertools import starmap
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response, StreamingResponse
from pydantic import Field

from .bodies import Body, EmptyList, EmptyObject, Inputs, Switch, Zero, inputs_of, takes
from .calls import Call, Here, Row, answer, encoded, error_body, headers_of, sent, whose
from .requests import Answer, Chance, Finish, Piece, RefusedError, Sampling
from .server import Server
from .store import Served
from .texts import Text

router = APIRouter(tags=["OpenAI's interface"])
MOST_MESSAGES = 1024
Model = Annotated[str, Field(max_length=512, description="the name of a model, as GET /v1/models has it")]
Tokens = Annotated[int, Field(ge=1, lt=2**31, description="a number of tokens, 1 or more")]
Stop = Annotated[str, Field(max_length=256)]


class OpenAIBody(Body):
    """What OpenAI's requests have in common: fields that change nothing here, whatever they are."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class StreamOptions(Body):
    """What a stream has besides the text."""

    include_usage: bool = False
    include_obfuscation: Any = None


class Generation(OpenAIBody):
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
    n: Literal[1] = 1
    logit_bias: EmptyObject
    frequency_penalty: Zero = 0
    presence_penalty: Zero = 0

    def sampling(self, max_tokens: int, chances: int | None) -> Sampling:
        """How tokens are chosen."""
        stop = tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop))
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, stop, chances)


class Completion(Generation):
    prompt: Inputs
    max_tokens: Tokens = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | Literal[False] = Field(
        False, description="a number of tokens from 0 to 5, or false"
    )
    best_of: Literal[1] = 1
    echo: Literal[False] = Field(False, description="false")
    suffix: Literal[""] = ""


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """Of a chat; an answer of ours can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = None
    annotations: EmptyList
    tool_calls: EmptyList
    tool_call_id: Any = None

    def plain(self) -> dict[str, str]:
        """As templates read it, which know no developers."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **({} if self.name is None else {"name": self.name})}


class Chat(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] = Field(
        description=f"1 to {MOST_MESSAGES:,} objects with role (system, developer, user, assistant or tool), content "
        '(a text, or a list of {"type": "text", "text": ...}) and perhaps name'
    )
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: Switch = False
    top_logprobs: int = Field(0, ge=0, le=20, description="a number of tokens from 0 to 20")
    response_format: dict[Literal["type"], Literal["text"]] = Field({"type": "text"}, description='{"type": "text"}')
    tools: EmptyList
    functions: EmptyList
    tool_choice: Literal["none", "auto"] = "none"
    function_call: Literal["none", "auto"] = "none"
    parallel_tool_calls: Literal[True] = Field(True, description="true")
    modalities: list[Literal["text"]] = Field(["text"], description='["text"]')
    reasoning_effort: Literal["none", "medium"] = "none"
    verbosity: Literal["medium"] = "medium"


class Embeddings(OpenAIBody):
    model: Model
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"


@router.get("/v1/models")
async def models(call: Here) -> Response:
    """The base, and every adapter with the base as its parent."""
    registry, base = call.server.registry, call.server.base.name

    def content() -> bytes:
        shown = [*([None] if call.key.sees(None) else []), *registry.versions(call.key)]
        cards = [_card(base, model) for model in shown]
        return encoded({"object": "list", "data": cards, "left_out": registry.left_out(call.key)})

    return answer(await call.in_turn(len(registry.bank), content))


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
    chances = None if body.logprobs is False else body.logprobs
    return await _generate(call, body, partial(call.server.texts.read, prompts), body.max_tokens, chances)


@router.post("/v1/chat/completions", openapi_extra=takes(Chat))
async def chat_completions(body: Annotated[Chat, sent(Chat)], call: Here) -> Response:
    """Answer a chat, written with the tokenizer's template."""
    if body.top_logprobs and not body.logprobs:
        raise RefusedError(400, "top_logprobs stand beside those of the text; send logprobs: true too")
    read = partial(call.server.texts.chat, [message.plain() for message in body.messages])
    chances = body.top_logprobs if body.logprobs else None
    return await _generate(call, body, read, body.max_completion_tokens or body.max_tokens, chances)


@router.post("/v1/embeddings", openapi_extra=takes(Embeddings))
async def embeddings(body: Annotated[Embeddings, sent(Embeddings)], call: Here) -> Response:
    """Vectors of length one for texts."""
    rows = await call.rows("embed", [body.model], inputs_of(body.input))

    def item(index: int, row: Row) -> dict[str, Any]:
        vector = row.values.numpy()
        is_base64 = body.encoding_format == "base64"
        values = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
        return {"object": "embedding", "index": index, "embedding": values, **whose(row.version)}

    count = sum(len(row.read.tokens) for row in rows)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return await call.answer_rows(rows, item, object="list", model=body.model, usage=usage)


async def _generate(
    call: Call, body: Generation, read: Callable[[str], Awaitable[list[Text]]], most: int | None, chances: int | None
) -> Response:
    """Continue texts that are read when it is clear that they may be, by at most so many tokens."""
    server = call.server
    server.base.require("generate")
    name = call.named(body.model)
    texts = await call.wait(read(call.key.queue_of(name)))
    room = server.longest - max(len(text.tokens) for text in texts)
    if (most or 0) > room:
        raise RefusedError(
            400,
            f"the prompt has {server.longest - room:,} tokens and {most:,} are to follow, and {server.base.name} "
            f"takes {server.longest:,} in all; ask for {room:,} or fewer",
        )
    # Until the last piece is sent, or nobody wants it.
    asking = call.asking("generate", [(name, text) for text in texts], body.sampling(most or room, chances))
    versions, parts = await call.request.state.held.enter_async_context(asking)
    shape = (_Chat if isinstance(body, Chat) else _Completion)(body.model, texts, versions[0], server)
    if not body.stream:
        return answer(await shape.response(parts), versions)
    events = shape.events(parts, body.stream_options.include_usage)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers_of(versions))


class _Completion:
    """The JSON of the continuations that a request gets, whole or in pieces."""

    kind = piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, texts: Sequence[Text], version: Served | None, server: Server) -> None:
        self.token, self.prompt_tokens, self.generated = server.texts.token, sum(len(t.tokens) for t in texts), 0
        self.offsets = [0] * len(texts)
        """Where the next token of each text begins."""
        self.common = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": whose(version)["digest"],
        }

    async def response(self, parts: AsyncIterator[tuple[int, Piece | Answer]]) -> dict[str, Any]:
        """All at once."""
        texts, chances = [""] * len(self.offsets), [list[Chance]() for _ in self.offsets]
        choices = [dict[str, Any]() for _ in self.offsets]
        async for index, part in parts:
            text, chance, finish = self.taken(part)
            texts[index] += text
            chances[index] += chance
            if finish is not None:
                choices[index] = self.choice(index, self.content(texts[index]), chances[index], finish)
        return {**self.common, "object": self.kind, "choices": choices, "usage": self.usage()}

    async def events(self, parts: AsyncIterator[tuple[int, Piece | Answer]], with_usage: bool) -> AsyncIterator[bytes]:
        """As it comes; an error that comes after the first event is one too."""
        common, started = {**self.common, "object": self.piece_kind}, set[int]()
        try:
            async for index, part in parts:
                text, chances, finish = self.taken(part)
                if text or chances or finish or index not in started:
                    content = self.piece(text, index not in started)
                    started.add(index)
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

    def content(self, text: str) -> dict[str, Any]:
        """What a choice has of a text."""
        return {"text": text}

    def piece(self, text: str, is_first: bool) -> dict[str, Any]:
        """What a choice has of a piece of a text."""
        return self.content(text)

    def choice(self, index: int, content: dict[str, Any], chances: Sequence[Chance], finish: str | None) -> Any:
        """One text, or a piece of it."""
        logarithms = self.logarithms(index, chances) if chances else None
        return {"index": index, **content, "logprobs": logarithms, "finish_reason": finish}

    def logarithms(self, index: int, chances: Sequence[Chance]) -> dict[str, Any]:
        """Log-probabilities of the tokens of a text, and where these begin."""
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for chance in chances:
            token, likeliest = self.token(chance.token), [*chance.likeliest, (chance.token, chance.logarithm)]
            row = token, chance.logarithm, {self.token(one): value for one, value in likeliest}, self.offsets[index]
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            self.offsets[index] += len(token)
        return columns

    def usage(self) -> dict[str, int]:
        """How many tokens were read and generated."""
        read, generated = self.prompt_tokens, self.generated
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


class _Chat(_Completion):
    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": {**role, "content": text} if text or is_first else role}

    def logarithms(self, index: int, chances: Sequence[Chance]) -> dict[str, Any]:
        tokens = [
            {**self.entry(chance.token, chance.logarithm), "top_logprobs": [*starmap(self.entry, chance.likeliest)]}
            for chance in chances
        ]
        return {"content": tokens, "refusal": None}

    def entry(self, token: int, logarithm: float) -> dict[str, Any]:
        """A token; one that is a part of a letter has no bytes of its own."""
        text = self.token(token)
        return {"token": text, "logprob": logarithm, "bytes": None if "\ufffd" in text else [*text.encode()]}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + encoded(content) + b"\n\n"


def _card(base: str, version: Served | None) -> dict[str, Any]:
    name, root, parent = (base, base, None) if version is None else (version.name, version.digest or version.name, base)
    return {"id": name, "object": "model", "created": 0, "owned_by": "dvora", "root": root, "parent": parent}
