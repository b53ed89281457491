"""Routes that change which adapters are served: by the request's body, or in the dialect of vLLM by a folder's name."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ..bank.adapters import SETTINGS, VALUES
from ..bank.packs import FORMAT, unpack
from ..flat import Layout
from ..sync import vector_digest
from ..whole_files import remove
from .answers import Body, headers_of, server_of
from .keys import changing
from .registry import Version, check_name
from .requests import RefusedError
from .server import Server
from .store import files_of_upload, files_of_vector, vector_of

router = APIRouter(tags=["adapters"])
changes = APIRouter(tags=["adapters"], dependencies=[Depends(changing)])


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
async def adapters(request: Request) -> dict[str, Any]:
    """All adapters, and what a flat vector has to be like."""
    server = server_of(request)
    cards = [server.registry.card(version) for version in server.registry.versions()]
    return {"base": server.base.name, "layout": _layout(server), "adapters": cards}


@router.get("/v1/adapters/{name}")
async def adapter(name: str, request: Request) -> Response:
    """One adapter with its digest and size; it is read now if nobody has used it."""
    server = server_of(request)
    async with server.versions([name]) as versions:
        version = versions[name]
        assert version is not None
        described = await asyncio.to_thread(server.store.description_of, name)
        card = {**server.registry.card(version), "bytes": described.size if described is not None else None}
        return JSONResponse(card, headers=headers_of([version]))


@changes.put("/v1/adapters/{name}")
async def put_adapter(
    name: str,
    request: Request,
    format: Literal["file", "vector"] = "file",
    layout: str | None = None,
    digest: str | None = None,
    labels: Annotated[list[str] | None, Query()] = None,
) -> Response:
    """Serve the adapter in the body from now on, and after a restart.

    The body is a file (`adapter_model.safetensors` of an adapter, or a pack of one), or the bytes of a flat vector,
    little-endian float32, in the layout that `GET /v1/adapters` describes; `layout` and `digest` (of
    `dvora.sync.vector_digest`) refuse another one than was sent. Files of values and vectors have the settings of the
    adapter that they replace, or of the others; a vector of a new name has a strength of one. `labels` are the names of
    the classes.
    """
    server = server_of(request)
    request.state.incoming.most = server.settings.largest_upload
    body = await request.body()
    check_name(name)
    if format != "vector" and (layout or digest):
        raise RefusedError(400, "layout and digest are those of a flat vector; add format=vector, or leave them out")
    if not body:
        raise RefusedError(400, "the body is empty; send an adapter, as curl --upload-file FILE does")
    vector, file = partial(_vector, server, name, body, layout, digest), partial(_file, server, name, body)
    files = vector if format == "vector" else file
    version, was_there = await asyncio.to_thread(_put, server, name, files, tuple(labels or ()))
    return JSONResponse(server.registry.card(version), 200 if was_there else 201, headers_of([version]))


@changes.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, request: Request) -> Response:
    """Serve an adapter no longer; requests that use it end with it. Files that the server was given stay."""
    server = server_of(request)
    version = await asyncio.to_thread(server.registry.delete, name)
    return JSONResponse(server.registry.card(version))


@changes.post("/v1/load_lora_adapter")
async def load(body: Load, request: Request) -> Response:
    """Serve an adapter in the folder of adapters, named relative to it."""
    server = server_of(request)

    def work() -> tuple[Version, bool]:
        folder = server.store.below(body.lora_path)
        return server.registry.load(body.lora_name, folder, is_upload=False, replaces=body.load_inplace)

    version, _ = await asyncio.to_thread(work)
    message = f"Success: LoRA adapter '{body.lora_name}' added successfully."
    return PlainTextResponse(message, headers=headers_of([version]))


@changes.post("/v1/unload_lora_adapter")
async def unload(body: Unload, request: Request) -> Response:
    """Serve an adapter no longer."""
    await asyncio.to_thread(server_of(request).registry.delete, body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _put(
    server: Server, name: str, files: Callable[[], dict[str, bytes]], labels: tuple[str, ...]
) -> tuple[Version, bool]:
    try:
        folder = server.store.write(files())
    except ValueError as error:
        raise RefusedError(422, f"the adapter cannot be served: {error}", "adapter_error") from error
    try:
        return server.registry.load(name, folder, labels, is_upload=True)
    except BaseException:
        remove(folder)
        raise


def _vector(server: Server, name: str, body: bytes, layout: str | None, digest: str | None) -> dict[str, bytes]:
    """The files of an adapter that came as a flat vector.

    Raises:
        ValueError: it is none, or another one than was sent.
    """
    like = server.store.description_of(name)
    if like is None:
        raise ValueError("there is no adapter yet whose layout a vector could have; put a folder there first")
    if layout is not None and layout != like.content.digest:
        raise ValueError(f"the vector's layout is {layout[:80]!r}, expected {like.content.digest!r}")
    if digest is not None and digest != (arrived := vector_digest(like.content.digest, body)):
        raise ValueError(f"the vector's digest is {digest[:80]!r}, and that of what arrived {arrived!r}; send it again")
    files = files_of_vector(vector_of(body), like)
    if name not in server.registry:
        # As in a bank: the strength of another adapter is none of its own.
        files[SETTINGS] = json.dumps({**json.loads(like.settings), "strength": 1.0}).encode()
    return files


def _file(server: Server, name: str, body: bytes) -> dict[str, bytes]:
    """The files of an adapter that came as a file of values or a pack.

    Raises:
        ValueError: it is none.
    """
    if f'"{FORMAT}"'.encode() not in body[:200]:
        return files_of_upload(body, server.store.description_of(name))
    with tempfile.TemporaryDirectory() as scratch:
        pack = Path(scratch) / "pack"
        pack.write_bytes(body)
        unpack(pack, Path(scratch) / "unpacked")
        folders = [*(Path(scratch) / "unpacked").iterdir()]
        if len(folders) != 1:
            raise ValueError(f"the pack has {len(folders)} adapters, expected one; send them one by one")
        return {file: (folders[0] / file).read_bytes() for file in (SETTINGS, VALUES)}


def _layout(server: Server) -> dict[str, Any] | None:
    like = server.store.description_of()
    if like is None:
        return None
    values = Layout(like.content).size
    return {"digest": like.content.digest, "values": values, "bytes": 4 * values, "settings": json.loads(like.settings)}
