"""OpenAI's routes: models and embeddings. What is not kept is refused."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from .bodies import Body, Inputs, inputs_of, takes
from .calls import Here, Row, answer, encoded, sent, whose
from .store import Served

router = APIRouter(tags=["OpenAI's interface"])


class Embeddings(Body):
    """Fields without a type change nothing here, whatever they are."""

    model: str = Field(max_length=512, description="the name of a model, as GET /v1/models has it")
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


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


def _card(base: str, version: Served | None) -> dict[str, Any]:
    name, root, parent = (base, base, None) if version is None else (version.name, version.digest or version.name, base)
    return {"id": name, "object": "model", "created": 0, "owned_by": "dvora", "root": root, "parent": parent}
