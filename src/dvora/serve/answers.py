"""What the routes have in common: bodies and what is wrong with them, rows for texts, answers and who gave them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError, to_json

from .keys import BASE, Key, asking
from .registry import Version
from .requests import RefusedError, Work
from .server import Client, Row, Server
from .texts import Input

ADAPTER, DIGEST = "x-dvora-adapter", "x-dvora-digest"
MOST_BRACKETS = 2**17
"""Of a body: each may be a list or an object, and a hundred thousand of them take a tenth of a second to read."""
MOST_PROBLEMS = 3
"""That an answer tells."""
ANYTHING = None
"""In place of neutral values: nothing comes of any."""
B = TypeVar("B", bound="Body")
Asking = Annotated[Key, Depends(asking)]
Switch = Annotated[bool, Field(description="true or false")]
# The first problem of a list is enough.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Inputs = Annotated[
    str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)],
    Field(description="a text, a list of texts, a list of tokens, or a list of such lists"),
]


class Body(BaseModel):
    """Of a request. A null is as if the field was left out; what is not kept is an error, unless it changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}
    """Fields that are not kept, with the values by which nothing changes."""

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, values: Any) -> Any:
        """Without nulls and what is neutral: all problems with names are one error, however many there are."""
        if not isinstance(values, dict):
            return values
        kept, problems = {}, []
        for name, value in values.items():
            allowed = cls.neutral.get(name, ())
            if value is None or allowed is ANYTHING or _is_one_of(value, allowed):
                continue
            kept[name] = value
            if name not in cls.model_fields:
                others = " or ".join([*(to_json(other).decode() for other in allowed), "null"])
                known = f"leave it out, or send {others}" if allowed else f"there are {', '.join(cls.model_fields)}"
                problems.append(f"{name[:40]} is no field that is kept here; {known}")
                if len(problems) == MOST_PROBLEMS:
                    break
        if problems:
            raise PydanticCustomError("kept", "{problems}", {"problems": "; ".join(problems)})
        return kept


def _is_one_of(value: Any, allowed: Iterable[Any]) -> bool:
    """With types, since True is 1."""
    return any(type(value) is type(other) and value == other for other in allowed)


def sent(kind: type[B]) -> Any:
    """A dependency: the body of a request. It is read when those before have let the client in."""

    async def body(request: Request) -> B:
        return await read(request, kind)

    return Depends(body)


async def read(request: Request, kind: type[B]) -> B:
    """The body of a request.

    Raises:
        RefusedError: 415, it is not said to be JSON; 400, it is none, or not of this kind.
    """
    # Other pages of a browser can send anything but this without being asked.
    if not request.headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json"):
        raise RefusedError(415, "the body has to be JSON; send the header 'Content-Type: application/json' with it")
    body = await request.body()
    if (brackets := body.count(b"[") + body.count(b"{")) > MOST_BRACKETS:
        raise RefusedError(400, f"the body has {brackets:,} brackets, and at most {MOST_BRACKETS:,} are read")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(400, _problems(error, kind)) from None


def _problems(error: ValidationError, kind: type[Body]) -> str:
    """What is wrong with a body, in the words of its fields' descriptions; the body is not repeated."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        # Behind a field and the number in its list come the names of Python's types.
        name, place = (
            (*map(str, problem["loc"][:1]), ""),
            [part for part in problem["loc"][1:2] if isinstance(part, int)],
        )
        path = ".".join(map(str, (*name[:-1], *place)))
        if problem["type"] == "kept":
            said = f"{path}: {problem['msg']}" if path else problem["msg"]
        elif path:
            missing = "is missing; " if problem["type"] == "missing" and not place else ""
            said = f"{path}: {missing}expected {kind.model_fields[name[0]].description}"
        else:
            said = f"the body is {problem['msg'] if problem['type'] == 'json_invalid' else 'no JSON object'}"
        problems.setdefault(path, said)
    return "; ".join([*problems.values()][:MOST_PROBLEMS])


def takes(kind: type[Body]) -> dict[str, Any]:
    """For a route's documentation: the schema of its body."""
    schema = kind.model_json_schema()
    content = {"application/json": {"schema": _inlined(schema, schema.get("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, parts: Mapping[str, Any]) -> Any:
    """A schema without references, which would be to the document around it."""
    if isinstance(schema, list):
        return [_inlined(part, parts) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(part, parts) for name, part in schema.items() if name != "$defs"}


def server_of(request: Request) -> Server:
    """The server that a request is for."""
    server: Server = request.app.state.server
    return server


@asynccontextmanager
async def listening(request: Request, key: Key) -> AsyncIterator[Client]:
    """The client of a request whose body has been read."""
    hung_up = asyncio.ensure_future(_until_gone(request))
    try:
        yield Client(key, request.state.deadline, hung_up)
    finally:
        hung_up.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def rows_of(
    request: Request,
    key: Key,
    work: Work,
    models: Sequence[str | None],
    texts: Sequence[Input],
    truncate: bool = False,
) -> list[Row]:
    """What comes out for texts, one after another, each by all models; no model is the base.

    Raises:
        RefusedError: there are too many, a model is unknown, or a text too long.
    """
    server = server_of(request)
    server.require(work)
    check_rows(server, len(models) * len(texts))
    names = [server.registry.named(server.base.name if model is None else model, key) for model in models]
    async with listening(request, key) as client:
        tokens = await client.wait(server.texts.read(texts, truncate=truncate))
        return await server.rows(work, [(name, text) for text in tokens for name in names], client)


def check_rows(server: Server, count: int) -> None:
    """Refuse a request of more rows than may wait.

    Raises:
        RefusedError: 400.
    """
    if not 0 < count <= (most := server.settings.limits.queue):
        raise RefusedError(400, f"the request has {count:,} rows (texts times models), expected 1 to {most:,}")


def inputs_of(inputs: Any) -> list[Input]:
    """The rows of `Inputs`."""
    return [inputs] if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)) else inputs


async def listed(request: Request, rows: Sequence[Row], item: Callable[[int, Row], Any], **frame: Any) -> Response:
    """An answer with an item for each row, written in a thread, where others take turns with it.

    Args:
        request: that is answered.
        rows: with what came out.
        item: of a row and its number, called in the thread.
        frame: what stands beside `data`; without it the items are all.
    """
    size = sum(row.values.numel() for row in rows)
    content = await server_of(request).texts.run(
        size, lambda _: b",".join(to_json(item(*row)) for row in enumerate(rows))
    )
    before, after = (to_json(frame)[:-1] + b',"data":[', b"]}") if frame else (b"[", b"]")
    headers = headers_of(row.version for row in rows)
    return Response(before + content + after, media_type="application/json", headers=headers)


def headers_of(versions: Iterable[Version | None]) -> dict[str, str]:
    """The headers that say whose answer it is, if one version gave it; of several the body says it."""
    names = {BASE if version is None else version.name: digest_of(version) for version in versions}
    return {ADAPTER: [*names][0], DIGEST: [*names.values()][0]} if len(names) == 1 else {}


def whose(version: Version | None) -> dict[str, str]:
    """The fields of a row that say whose it is."""
    return {"adapter": BASE if version is None else version.name, "digest": digest_of(version)}


def digest_of(version: Version | None) -> str:
    """What names the content that answered."""
    return BASE if version is None else str(version.digest)


def error_body(message: str, kind: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": kind}}
