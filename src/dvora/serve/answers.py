"""What the routes have in common: bodies and what is wrong with them, rows for texts, answers and who gave them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from fastapi import Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, to_json
from torch import Tensor

from .keys import BASE, Asking
from .registry import Version
from .requests import Answer, RefusedError, Sampling, Work
from .server import Client, Server
from .texts import Input

ADAPTER, DIGEST = "x-dvora-adapter", "x-dvora-digest"
MOST_PARTS, MOST_VALUES = 2**15, 2**20
"""Lists, objects and names of a body, and values: what takes a tenth of a second to read, in which nobody is served."""
MOST_NUMBERS, SMALL_BODY = 2**21, 2**16
"""Of an answer; and bytes of a body that are read in a millisecond."""
MOST_PROBLEMS = 3
"""That an answer tells."""
B = TypeVar("B", bound="Body")
T = TypeVar("T")
_json = partial(to_json, inf_nan_mode="null")
Switch = Annotated[bool, Field(description="true or false")]
# Of a list that is wrong the first problem is enough.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Inputs = Annotated[
    str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)],
    Field(description="a text, a list of texts, a list of tokens, or a list of such lists"),
]


class Row(NamedTuple):
    """What came out for one row."""

    version: Version | None
    """Of its adapter; None is the base."""
    values: Tensor
    tokens: int
    """Of its text."""


class Body(BaseModel):
    """Of a request. A null is as if the field was left out; what is not kept is an error, unless it changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[dict[str, tuple[Any, ...] | None]] = {}
    """Fields that are not kept, with the values by which nothing changes, None for any: an argument of each class."""

    def __init_subclass__(cls, neutral: Mapping[str, tuple[Any, ...] | None] | None = None) -> None:
        super().__init_subclass__()
        cls.neutral = {**cls.neutral, **(neutral or {})}

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, values: Any) -> Any:
        """Only what is kept. Names that are not are one problem, however many there are."""
        if not isinstance(values, dict):
            return values
        kept, problems = {}, list[str]()
        for name, value in values.items():
            allowed = cls.neutral.get(name, ())
            # By type as well, since True is 1.
            if value is None or allowed is None or any(type(value) is type(one) and value == one for one in allowed):
                continue
            kept[name] = value
            if name not in cls.model_fields:
                neutral = " or ".join([*(to_json(one).decode() for one in allowed), "null"])
                advice = f"send {neutral}, or leave it out" if allowed else f"expected {', '.join(cls.model_fields)}"
                problems.append(f"{name[:40]} is not kept here; {advice}")
                if len(problems) == MOST_PROBLEMS:
                    break
        if problems:
            raise PydanticCustomError("kept", "{problems}", {"problems": "; ".join(problems)})
        return kept


def _parsed(body: bytes, kind: type[B]) -> B:
    # Of texts nothing counts: without escaped quotes every second part is one.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"") if _has_too_much(body) else b""
    if _has_too_much(b"".join(unescaped.split(b'"')[::2])):
        raise RefusedError(
            400,
            f"the body has too many parts; at most {MOST_PARTS:,} lists, objects and names and {MOST_VALUES:,} values "
            "are read, so send less at a time",
        )
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(400, _problems(error, kind)) from None


def _has_too_much(body: bytes) -> bool:
    return sum(map(body.count, (b"[", b"{", b":"))) > MOST_PARTS or body.count(b",") > MOST_VALUES


def sent(kind: type[B]) -> Any:
    """A dependency: the body. Unlike FastAPI's it is read after the key, and what is wrong is told in a few words."""

    async def body(call: Here) -> B:
        return await call.read(kind)

    return Depends(body)


def takes(kind: type[Body]) -> dict[str, Any]:
    """What the documentation of a route says of its body."""
    schema = {**kind.model_json_schema(), "$id": f"/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _problems(error: ValidationError, kind: type[Body]) -> str:
    """What is wrong with a body, by the descriptions of its fields; nothing of the body is repeated."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # After a field and the place in its list come names of Python's types.
        path = [*problem["loc"][:1], *(part for part in problem["loc"][1:2] if isinstance(part, int))]
        place, said = ".".join(map(str, path)), problem["msg"]
        if problem["type"] == "json_invalid":
            said = f"the body is no JSON: {said}"
        elif problem["type"] != "kept":
            said = f"expected {kind.model_fields[str(path[0])].description if path else 'a JSON object'}"
        problems.setdefault(place, f"{place}: {said}" if place else said)
    return "; ".join([*problems.values()][:MOST_PROBLEMS])


def inputs_of(inputs: Any) -> list[Input]:
    """The rows of `Inputs`."""
    return [inputs] if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)) else inputs


class Call:
    """A request of a client whose key is known: a dependency of all routes of models."""

    def __init__(self, request: Request, key: Asking) -> None:
        self.request, self.key = request, key
        self.server: Server = request.app.state.server

    async def read(self, kind: type[B]) -> B:
        """The body; what takes long to read waits for its turn beside the loop.

        Raises:
            RefusedError: 400, it does not say that it is JSON, is none, or not of this kind.
        """
        body = await self.request.body()
        # A page of another site can send anything but this without asking.
        if not self.request.headers.get("content-type", "").partition(";")[0].strip().endswith("json"):
            raise RefusedError(400, "the body has to be JSON; send it with the header 'Content-Type: application/json'")
        if len(body) <= SMALL_BODY:
            return _parsed(body, kind)
        return await self.server.texts.run(len(body), self.key.queue_of(None), lambda _: _parsed(body, kind))

    def named(self, model: str | None) -> str | None:
        """The adapter of a name that a client gives; none is the base.

        Raises:
            RefusedError: 404, the key sees no such model.
        """
        return self.server.registry.named(self.server.base.name if model is None else model, self.key)

    def check(self, rows: int) -> None:
        """Refuse more rows than may wait.

        Raises:
            RefusedError: 400.
        """
        most = self.server.settings.queue
        if not 0 < rows <= most:
            raise RefusedError(400, f"the request has {rows:,} rows (texts times models), expected 1 to {most:,}")

    async def change(self, name: str, function: Callable[[str], T]) -> T:
        """Change an adapter; clients take turns, in a thread that nobody else waits for.

        Args:
            name: of the adapter.
            function: called with the name.

        Raises:
            RefusedError: 403, the key is not for the name; 504, its turn did not come in time; what has begun is ended.
        """
        self.key.check_changes(name)

        def in_time() -> T:
            if time.monotonic() > self.request.state.deadline:
                raise RefusedError(504, "others change adapters all the time, and nothing was changed", "timeout")
            return function(name)

        return await self.server.changes.run(self.key.queue_of(None), in_time)

    def client(self) -> Client:
        """Who waits: until its time is over, or it hangs up."""
        hung_up = asyncio.ensure_future(self._until_gone())
        self.request.state.held.callback(hung_up.cancel)
        return Client(self.key, self.request.state.deadline, hung_up)

    async def _until_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def rows(
        self, work: Work, models: Sequence[str | None], texts: Sequence[Input], truncate: bool = False
    ) -> list[Row]:
        """What comes out for texts, one after another, each by all models, in as few batches as they fit.

        Raises:
            RefusedError: there are too many, a model is unknown or damaged, a text is too long, or it took too long.
        """
        server = self.server
        server.require(work)
        self.check(len(models) * len(texts))
        names = [self.named(model) for model in models]
        if work == "classify" and not server.base.has_own_head and None in names:
            raise RefusedError(
                400, f"{server.base.name} has no trained head of its own, so it classifies nothing; name an adapter"
            )
        client = self.client()
        read = await client.wait(server.texts.read(texts, self.key.queue_of(names[0]), truncate=truncate))
        rows = [(name, text) for text in read for name in names]
        async with server.asking(work, rows, client, Sampling()) as (versions, parts):
            answers = {number: part async for number, part in parts if isinstance(part, Answer)}
        return [
            Row(version, answers[number].values, len(text.tokens))
            for number, (version, (_, text)) in enumerate(zip(versions, rows, strict=True))
        ]

    async def answer_rows(self, rows: Sequence[Row], item: Callable[[int, Row], Any], **frame: Any) -> Response:
        """An answer with an item for each row, written in a thread, where others take turns with it.

        Args:
            rows: with what came out.
            item: of a row and its number, called in the thread.
            frame: what stands beside `data`; without it the items are all.
        """
        if (size := sum(row.values.numel() for row in rows)) > MOST_NUMBERS:
            raise RefusedError(
                400, f"the answer has {size:,} numbers, expected at most {MOST_NUMBERS:,}; send fewer texts"
            )
        queue = self.key.queue_of(None)
        content = await self.server.texts.run(
            size, queue, lambda _: b",".join(_json(item(*row)) for row in enumerate(rows))
        )
        before, after = (_json(frame)[:-1] + b',"data":[', b"]}") if frame else (b"[", b"]")
        return answer(before + content + after, [row.version for row in rows])


Here = Annotated[Call, Depends()]


def whose(version: Version | None) -> dict[str, str]:
    """The fields of a row that say which version gave it."""
    name, digest = (BASE, BASE) if version is None else (version.name, str(version.digest))
    return {"adapter": name, "digest": digest}


def headers_of(versions: Iterable[Version | None]) -> dict[str, str]:
    """The headers that say which version answered, if it was one; of several the rows say it."""
    distinct = {*versions}
    return dict(zip((ADAPTER, DIGEST), whose(distinct.pop()).values(), strict=True)) if len(distinct) == 1 else {}


def answer(content: Any, versions: Iterable[Version | None] = (), status: int = 200) -> Response:
    """An answer, by the versions that gave it; bytes are JSON already."""
    body = content if isinstance(content, bytes) else _json(content)
    return Response(body, status, headers_of(versions), "application/json")


def error_body(refusal: RefusedError) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": refusal.message, "type": refusal.kind, "param": None, "code": refusal.kind}}


def refused(refusal: RefusedError) -> Response:
    """A refusal as its client reads it."""
    return JSONResponse(error_body(refusal), refusal.status, refusal.headers)
