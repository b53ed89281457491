"""Routes of adapters: what there is, and what changes it, by the request's body or in the dialect of vLLM."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field, StringConstraints

from ..adapter_file.uploads import Upload
from ..flat import Layout
from .access import changing
from .bodies import Body, Switch, takes
from .calls import Call, Here, answer, encoded, headers_of, sent
from .registry import unknown
from .requests import RefusedError
from .store import Served

router = APIRouter(tags=["adapters"])
Label = Annotated[str, StringConstraints(max_length=256)]
changes = APIRouter(tags=["adapters"], dependencies=[Depends(changing)])
"""Of what changes adapters: a client that may not is refused before its body is read."""


class Load(Body):
    lora_name: str = Field(description="a name for the adapter")
    lora_path: str = Field(description="the folder of an adapter, relative to that of all")
    load_inplace: Switch = False


class Unload(Body):
    lora_name: str = Field(description="the name of an adapter")
    lora_int_id: Any = None


@router.get("/v1/adapters")
async def adapters(call: Here) -> Response:
    """All adapters, and what a flat vector has to be like."""
    registry = call.server.registry

    def content() -> bytes:
        cards = [_card(version, call) for version in registry.versions(call.key)]
        listed = {"adapters": cards, "left_out": registry.left_out(call.key)}
        return encoded({"base": call.server.base.name, "layout": _layout(call), **listed})

    return answer(await call.in_turn(len(registry.bank), content))


@router.get("/v1/adapters/{name}")
async def adapter(name: str, call: Here) -> Response:
    """One adapter with its digest and size; it is read now if nobody has used it."""
    async with call.server.versions([call.named(name)]) as versions:
        (version,) = versions.values()
        if version is None:
            raise unknown(name)
        return answer({**_card(version, call), "bytes": version.description.size}, [version])


@changes.put("/v1/adapters/{name}")
async def put_adapter(
    name: str,
    call: Here,
    format: Literal["file", "vector"] = "file",
    labels: Annotated[list[Label] | None, Query()] = None,
) -> Response:
    """Serve the adapter in the body from now on, and after a restart.

    The body is a file (`adapter_model.safetensors` of an adapter, or a pack of one), or the bytes of a flat vector,
    little-endian float32, in the layout that `GET /v1/adapters` describes. Files of values and vectors have the
    settings of the adapter that they replace; under a new name those that all adapters have in common, and a strength
    of one. `labels` are the names of the classes.
    """
    call.key.check_changes(name)
    call.request.state.incoming.most = call.server.settings.upload
    if not (body := await call.request.body()):
        raise RefusedError(400, "the body is empty; send an adapter, as curl --upload-file FILE does")
    upload = Upload(body, format == "vector", tuple(labels or ()))
    put = partial(call.server.registry.put, upload=upload, key=call.key)
    version, was_there = await call.change(name, put)
    return answer(_card(version, call), [version], 200 if was_there else 201)


@changes.delete("/v1/adapters/{name}")
async def delete_adapter(name: str, call: Here) -> Response:
    """Serve an adapter no longer; requests that use it end with it. Files that the server was given stay."""
    version = await call.change(name, call.server.registry.delete)
    return answer({"name": name} if version is None else _card(version, call))


@changes.post("/v1/load_lora_adapter", openapi_extra=takes(Load))
async def load(body: Annotated[Load, sent(Load)], call: Here) -> Response:
    """Serve an adapter in the folder of adapters, named relative to it."""
    name, registry = body.lora_name, call.server.registry
    if not call.key.sees_all:
        raise RefusedError(403, "this key puts adapters in a request's body; folders are everybody's", "forbidden")
    version = await call.change(name, partial(registry.load, path=body.lora_path, replaces=body.load_inplace))
    message = f"Success: LoRA adapter '{name}' added successfully."
    return PlainTextResponse(message, headers=headers_of([version]))


@changes.post("/v1/unload_lora_adapter", openapi_extra=takes(Unload))
async def unload(body: Annotated[Unload, sent(Unload)], call: Here) -> Response:
    """Serve an adapter no longer."""
    await call.change(body.lora_name, call.server.registry.delete)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _card(version: Served, call: Call) -> dict[str, Any]:
    """What clients are told of an adapter."""
    return {
        "name": version.name,
        "base": call.server.base.name,
        "digest": version.digest,
        "labels": version.labels,
        "uploaded": version.upload is not None,
    }


def _layout(call: Call) -> dict[str, Any] | None:
    if (like := call.server.registry.like(None, call.key)) is None:
        return None
    values, settings = Layout(like.content).size, json.loads(call.server.base.common_settings(like))
    del settings["base_probes"]
    return {"digest": like.content.digest, "values": values, "bytes": 4 * values, "settings": settings}
