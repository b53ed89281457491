"""Routes of adapters: what there is, and what changes it, by the request's body or in the dialect of vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import Field, StringConstraints
from pydantic_core import to_json

from ..flat import Layout
from .answers import Body, Switch, headers_of, sent, server_of, takes
from .keys import Asking, Changing, Key, changing
from .registry import Version
from .requests import RefusedError
from .server import Server
from .uploads import Upload

router = APIRouter(tags=["adapters"])
Label = Annotated[str, StringConstraints(max_length=256)]
changes = APIRouter(tags=["adapters"], dependencies=[Depends(changing)])
"""Of what changes adapters: a client that may not is refused before its body is read."""


class Load(Body):
    """Of /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str = Field(description="a name for the adapter")
    lora_path: str = Field(description="the folder of an adapter, relative to that of all")
    load_inplace: Switch = False


class Unload(Body, neutral={"lora_int_id": None}):
    """Of /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str = Field(description="the name of an adapter")


@router.get("/v1/adapters")
async def adapters(request: Request, key: Asking) -> Response:
    """All adapters, and what a flat vector has to be like."""
    server, registry = server_of(request), server_of(request).registry

    def write(versions: Sequence[Version]) -> bytes:
        cards = [registry.card(version) for version in versions]
        content = {"base": server.base.name, "layout": _layout(server, key), "adapters": cards}
        return to_json({**content, "left_out": registry.left_out(key)})

    return Response(registry.listed("adapters", key, write), media_type="application/json")


@router.get("/v1/adapters/{name}")
async def adapter(name: str, request: Request, key: Asking) -> Response:
    """One adapter with its digest and size; it is read now if nobody has used it."""
    server = server_of(request)
    server.registry.adapter(name, key)
    async with server.versions([name]) as versions:
        version = versions[name]
        assert version is not None
        card = {**server.registry.card(version), "bytes": version.description.size}
        return JSONResponse(card, headers=headers_of([version]))


@changes.put("/v1/adapters/{name}")
async def put_adapter(
    name: str,
    request: Request,
    key: Changing,
    format: Literal["file", "vector"] = "file",
    layout: Annotated[str | None, Query(max_length=64)] = None,
    digest: Annotated[str | None, Query(max_length=64)] = None,
    labels: Annotated[list[Label] | None, Query()] = None,
    replace: bool = True,
) -> Response:
    """Serve the adapter in the body from now on, and after a restart.

    The body is a file (`adapter_model.safetensors` of an adapter, or a pack of one), or the bytes of a flat vector,
    little-endian float32, in the layout that `GET /v1/adapters` describes; `layout` and `digest` (of
    `dvora.sync.vector_digest`) refuse another one than was sent. Files of values and vectors have the settings of the
    adapter that they replace; under a new name those that all adapters have in common, and a strength of one.
    `labels` are the names of the classes. With `replace=false` a name that is taken keeps its adapter: the answer is
    409, unless it is the one that was sent.
    """
    server = server_of(request)
    key.check_changes(name)
    if format != "vector" and (layout or digest):
        raise RefusedError(400, "layout and digest are those of a flat vector; add format=vector, or leave them out")
    request.state.incoming.most = server.settings.upload
    if not (body := await request.body()):
        raise RefusedError(400, "the body is empty; send an adapter, as curl --upload-file FILE does")
    upload = Upload(body, format == "vector", layout, digest, tuple(labels or ()))
    version, was_there = await server.changed(
        partial(server.registry.put, name, upload, key=key, replaces=replace),
        key.queue_of(None),
        request.state.deadline,
    )
    return JSONResponse(server.registry.card(version), 200 if was_there else 201, headers_of([version]))


@changes.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, request: Request, key: Changing) -> Response:
    """Serve an adapter no longer; requests that use it end with it. Files that the server was given stay."""
    server = server_of(request)
    key.check_changes(name)
    version = await server.changed(partial(server.registry.delete, name), key.queue_of(None), request.state.deadline)
    return JSONResponse({"name": name} if version is None else server.registry.card(version))


@changes.post("/v1/load_lora_adapter", openapi_extra=takes(Load))
async def load(body: Annotated[Load, sent(Load)], request: Request, key: Changing) -> Response:
    """Serve an adapter in the folder of adapters, named relative to it."""
    server = server_of(request)
    key.check_changes(body.lora_name)
    if not key.sees_all:
        raise RefusedError(403, "this key puts adapters in a request's body; folders are everybody's", "forbidden")
    version = await server.changed(
        partial(server.registry.load, body.lora_name, body.lora_path, replaces=body.load_inplace),
        key.queue_of(None),
        request.state.deadline,
    )
    message = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(message, headers=headers_of([version]))


@changes.post("/v1/unload_lora_adapter", openapi_extra=takes(Unload))
async def unload(body: Annotated[Unload, sent(Unload)], request: Request, key: Changing) -> Response:
    """Serve an adapter no longer."""
    server = server_of(request)
    key.check_changes(body.lora_name)
    await server.changed(partial(server.registry.delete, body.lora_name), key.queue_of(None), request.state.deadline)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _layout(server: Server, key: Key) -> dict[str, Any] | None:
    if (like := server.registry.like(None, key)) is None:
        return None
    values = Layout(like.content).size
    return {
        "digest": like.content.digest,
        "values": values,
        "bytes": 4 * values,
        # Which may be a path of this machine.
        "settings": {**json.loads(like.settings), "base_model_name_or_path": server.base.name},
        "base": like.content.to_dict()["base"],
    }
