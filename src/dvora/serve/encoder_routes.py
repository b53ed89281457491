"""Routes of encoders: classes by the adapters' heads, and the routes of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from torch import Tensor

from .. import __version__
from .answers import Body, digest_of, headers_of, rows_of, server_of
from .keys import BASE
from .registry import Version
from .requests import RefusedError
from .server import Row, Server

router = APIRouter(tags=["encoders"])
Pair = Annotated[list[str], Field(min_length=1, max_length=2)]


class Classify(Body):
    """Of /v1/classify."""

    model: str | Annotated[list[str], Field(min_length=1)]
    input: str | list[str] | list[Pair]
    truncate: bool = False


class Predict(Body):
    """Of /predict; two texts are a pair, several rows are lists of one text or two."""

    inputs: str | Pair | list[Pair]
    model: str | None = None
    truncate: bool = False
    raw_scores: bool = False


class Embed(Body):
    """Of /embed."""

    inputs: str | list[str]
    model: str | None = None
    truncate: bool = False


class Rerank(Body):
    """Of /rerank."""

    query: str
    texts: list[str] = Field(min_length=1)
    model: str | None = None
    truncate: bool = False
    raw_scores: bool = False
    return_text: bool = False


@router.post("/v1/classify")
async def classify(body: Classify, request: Request) -> Response:
    """Classes of texts, by one adapter or by each of several, which run in one pass."""
    server = server_of(request)
    models = [body.model] if isinstance(body.model, str) else body.model
    inputs: Sequence[Any] = [body.input] if isinstance(body.input, str) else body.input
    rows = await rows_of(request, "classify", models, inputs, body.truncate)
    data = [
        {"index": index // len(models), "model": models[index % len(models)], **classes_of(row, server)}
        for index, row in enumerate(rows)
    ]
    content = {"object": "list", "model": body.model, "data": data}
    return JSONResponse(content, headers=headers_of(row.version for row in rows))


@router.post("/predict")
async def predict(body: Predict, request: Request) -> Response:
    """Classes with their scores, the likeliest first."""
    server = server_of(request)
    is_one = isinstance(body.inputs, str) or all(isinstance(text, str) for text in body.inputs)
    inputs: Sequence[Any] = [body.inputs] if is_one else body.inputs
    rows = await rows_of(request, "classify", [body.model], inputs, body.truncate)
    answers = [_scores(row, server, body.raw_scores) for row in rows]
    return JSONResponse(answers[0] if is_one else answers, headers=headers_of(row.version for row in rows))


@router.post("/embed")
async def embed(body: Embed, request: Request) -> Response:
    """Vectors of length one."""
    inputs = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    rows = await rows_of(request, "embed", [body.model], inputs, body.truncate)
    return JSONResponse([row.values.tolist() for row in rows], headers=headers_of(row.version for row in rows))


@router.post("/rerank")
async def rerank(body: Rerank, request: Request) -> Response:
    """Texts by how well they fit a query, where the adapter's head gives one score."""
    pairs = [[body.query, text] for text in body.texts]
    rows = await rows_of(request, "classify", [body.model], pairs, body.truncate)
    if rows[0].values.numel() != 1:
        raise RefusedError(
            400, f"the head has {rows[0].values.numel()} outputs, and texts are ranked by one; use /predict"
        )
    scores = torch.cat([row.values for row in rows])
    scores = scores if body.raw_scores else scores.sigmoid()
    answers = [
        {"index": index, "score": float(scores[index]), **({"text": body.texts[index]} if body.return_text else {})}
        for index in scores.argsort(descending=True).tolist()
    ]
    return JSONResponse(answers, headers=headers_of(row.version for row in rows))


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """What is served, and its limits."""
    server = server_of(request)
    limits = server.settings.limits
    return {
        "model_id": server.base.name,
        "model_dtype": str(server.base.model.dtype).removeprefix("torch."),
        "works": list(server.works),
        "adapters": len(server.registry),
        "slots": limits.slots,
        "max_input_length": server.longest,
        "max_batch_tokens": limits.batch_tokens,
        "max_batch_requests": limits.batch_rows,
        "max_client_batch_size": limits.queue,
        "version": __version__,
    }


def classes_of(row: Row, server: Server) -> dict[str, Any]:
    """The likeliest class of a row with all probabilities, or the number that a head of one output gives."""
    common = {"adapter": BASE if row.version is None else row.version.name, "digest": digest_of(row.version)}
    if row.values.numel() == 1:
        return {**common, "label": None, "score": float(row.values), "probs": [], "num_classes": 0}
    probabilities, labels = row.values.softmax(-1), _labels(row.version, row.values, server)
    best = int(probabilities.argmax())
    return {
        **common,
        "label": labels[best],
        "score": float(probabilities[best]),
        "probs": probabilities.tolist(),
        "labels": labels,
        "num_classes": len(labels),
    }


def _labels(version: Version | None, values: Tensor, server: Server) -> list[str]:
    count = values.numel()
    if version is not None and len(version.labels) == count:
        return list(version.labels)
    names: dict[int, str] = server.base.model.config.id2label
    if version is None and len(names) == count:
        return [names[index] for index in range(count)]
    return [f"LABEL_{index}" for index in range(count)]


def _scores(row: Row, server: Server, is_raw: bool) -> list[dict[str, Any]]:
    one = row.values.numel() == 1
    scores = row.values if is_raw else row.values.sigmoid() if one else row.values.softmax(-1)
    labels = _labels(row.version, row.values, server)
    order = scores.argsort(descending=True).tolist()
    return [{"label": labels[index], "score": float(scores[index])} for index in order]
