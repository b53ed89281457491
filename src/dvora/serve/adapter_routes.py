"""Routes of adapters: what there is, and what changes it, by the request's body or in the dialect of vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic_core import to_json

from ..flat import Layout
from .answers import Body, headers_of, server_of
from .keys import Asking, Changing, Key
from .registry import Version
from .requests import RefusedError
from .server import Server
from .uploads import Upload

router = APIRouter(tags=["adapters"])


class Load(Body):
    """Of /v1/load_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(Body):
    """Of /v1/unload_lora_adapter, as vLLM has it."""

    lora_name: str
    lora_int_id: int | None = None


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


@router.put("/v1/adapters/{name}")
async def put_adapter(
    name: str,
    request: Request,
    key: Changing,
    format: Literal["file", "vector"] = "file",
    layout: Annotated[str | None, Query(max_length=64)] = None,
    digest: Annotated[str | None, Query(max_length=64)] = None,
    labels: Annotated[list[str] | None, Query()] = None,
) -> Response:
    """Serve the adapter in the body from now on, and after a restart.

    The body is a file (`adapter_model.safetensors` of an adapter, or a pack of one), or the bytes of a flat vector,
    little-endian float32, in the layout that `GET /v1/adapters` describes; `layout` and `digest` (of
    `dvora.sync.vector_digest`) refuse another one than was sent. Files of values and vectors have the settings of the
    adapter that they replace; under a new name those that all adapters have in common, and a strength of one.
    `labels` are the names of the classes.
    """
    server = server_of(request)
    key.check_changes(name)
    if format != "vector" and (layout or digest):
        raise RefusedError(400, "layout and digest are those of a flat vector; add format=vector, or leave them out")
    request.state.incoming.most = server.settings.largest_upload
    if not (body := await request.body()):
        raise RefusedError(400, "the body is empty; send an adapter, as curl --upload-file FILE does")
    upload = Upload(body, format == "vector", layout, digest, tuple(labels or ()))
    version, was_there = await server.changed(partial(server.registry.put, name, upload))
    return JSONResponse(server.registry.card(version), 200 if was_there else 201, headers_of([version]))


@router.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, request: Request, key: Changing) -> Response:
    """Serve an adapter no longer; requests that use it end with it. Files that the server was given stay."""
    server = server_of(request)
    key.check_changes(name)
    version = await server.changed(partial(server.registry.delete, name))
    return JSONResponse({"name": name} if version is None else server.registry.card(version))


@router.post("/v1/load_lora_adapter")
async def load(body: Load, request: Request, key: Changing) -> Response:
    """Serve an adapter in the folder of adapters, named relative to it."""
    server = server_of(request)
    key.check_changes(body.lora_name)
    if not key.sees_all:
        raise RefusedError(403, "this key puts adapters in a request's body; folders are everybody's", "forbidden")
    version = await server.changed(
        partial(server.registry.load, body.lora_name, body.lora_path, replaces=body.load_inplace)
    )
    message = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(message, headers=headers_of([version]))


@router.post("/v1/unload_lora_adapter")
async def unload(body: Unload, request: Request, key: Changing) -> Response:
    """Serve an adapter no longer."""
    server = server_of(request)
    key.check_changes(body.lora_name)
    await server.changed(partial(server.registry.delete, body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _layout(server: Server, key: Key) -> dict[str, Any] | None:
    if (like := server.registry.like(None, key)) is None:
        return None
    values = Layout(like.content).size
    return {"digest": like.content.digest, "values": values, "bytes": 4 * values, "settings": json.loads(like.settings)}
