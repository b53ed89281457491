"""Routes of encoders: classes by the adapters' heads, and the routes of text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field
from torch import Tensor

from .. import __version__
from ..recipes.tasks.entities import entities_in
from .bodies import Body, Inputs, Switch, Texts, inputs_of, takes
from .calls import Here, Row, answer, sent, whose
from .requests import RefusedError
from .server import Server

router = APIRouter(tags=["encoders"])
Pair = Annotated[list[str], Field(min_length=1, max_length=2, fail_fast=True)]
Pairs = Annotated[list[Pair], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(description="a text")]


class Classify(Body):
    model: str | Texts = Field(description="the name of an adapter, or a list of such names")
    input: str | Texts | Pairs = Field(description="a text, a list of texts, or a list of lists of one text or two")
    truncate: Switch = False
    abstain_below: float | None = Field(None, ge=0, le=1, description="a probability, 0 to 1")


class _Inputs(Body):
    """What the routes of text-embeddings-inference have in common; the adapter may stand in the query instead."""

    model: str | None = Field(None, description="the name of an adapter")
    truncate: Switch = False
    truncation_direction: Literal["Right", "right"] = "Right"
    auto_truncate: Literal[False] = Field(False, description="false")


class Parameters(Body):
    """As the pipelines of transformers have them."""

    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None
    top_k: int | None = Field(default=None, ge=1)


class Predict(_Inputs):
    """Of /predict; two texts are a pair, several rows are lists of one text or two."""

    inputs: str | Pair | Pairs = Field(description="a text, a pair of texts, or a list of lists of one text or two")
    raw_scores: Switch = False
    parameters: Parameters = Field(
        Parameters(),
        description='an object with "function_to_apply" ("sigmoid", "softmax" or "none") and "top_k", 1 or more',
    )


class Embed(_Inputs):
    inputs: Inputs
    normalize: Literal[True] = Field(True, description="true")
    encoding_format: Literal["float"] = "float"


class Rerank(_Inputs):
    query: Text
    texts: Texts = Field(description="a list of texts")
    raw_scores: Switch = False
    return_text: Switch = False


@router.post("/v1/classify", openapi_extra=takes(Classify))
async def classify(body: Annotated[Classify, sent(Classify)], call: Here) -> Response:
    """Classes of texts, by one adapter or by each of several, which run in one pass."""
    models = [body.model] if isinstance(body.model, str) else body.model
    least = call.server.settings.abstain_below if body.abstain_below is None else body.abstain_below
    if body.abstain_below is not None and call.server.base.has_tags:
        raise RefusedError(400, "abstain_below is for classes of texts; each entity has a score, leave it out")
    rows = await call.rows("classify", models, inputs_of(body.input), body.truncate)

    def item(index: int, row: Row) -> dict[str, Any]:
        classes = classes_of(row, call.server, least)
        return {"index": index // len(models), "model": models[index % len(models)], **classes}

    return await call.answer_rows(rows, item, object="list", model=body.model)


@router.post("/predict", openapi_extra=takes(Predict))
async def predict(body: Annotated[Predict, sent(Predict)], call: Here) -> Response:
    """Classes with their scores, the likeliest first, or entities; of one text with `parameters` in a list, as
    pipelines do."""
    if call.server.base.has_tags and (body.raw_scores or "parameters" in body.model_fields_set):
        raise RefusedError(400, "raw_scores and parameters are for classes of texts; leave them out")
    is_one = isinstance(body.inputs, str) or isinstance(body.inputs[0], str)
    inputs: Sequence[Any] = [body.inputs] if is_one else body.inputs
    rows = await call.rows("classify", [body.model], inputs, body.truncate)
    if is_one and "parameters" not in body.model_fields_set:
        return answer(_scores(rows[0], call.server, body), [rows[0].version])
    return await call.answer_rows(rows, lambda _, row: _scores(row, call.server, body))


@router.post("/classify", openapi_extra=takes(Predict))
async def classify_as_routers_ask(body: Annotated[Predict, sent(Predict)], call: Here) -> Response:
    """`/predict` where no adapter has to be named, if the key sees but one: semantic-router's `http_classify`."""
    seen = call.server.registry.versions(call.key)
    if body.model is None and "model" not in call.request.query_params and len(seen) == 1:
        body = body.model_copy(update={"model": seen[0].name})
    return await predict(body, call)


@router.post("/embed", openapi_extra=takes(Embed))
async def embed(body: Annotated[Embed, sent(Embed)], call: Here) -> Response:
    """Vectors of length one."""
    rows = await call.rows("embed", [body.model], inputs_of(body.inputs), body.truncate)
    return await call.answer_rows(rows, lambda _, row: row.values.tolist())


@router.post("/", openapi_extra=takes(Predict))
async def root(call: Here) -> Response:
    """`/predict` where the base or adapters classify, else `/embed`."""
    if "classify" in call.server.base.works:
        return await predict(await call.read(Predict), call)
    return await embed(await call.read(Embed), call)


@router.post("/rerank", openapi_extra=takes(Rerank))
async def rerank(body: Annotated[Rerank, sent(Rerank)], call: Here) -> Response:
    """Texts by how well they fit a query, where the adapter's head gives one score."""
    pairs = [[body.query, text] for text in body.texts]
    rows = await call.rows("classify", [body.model], pairs, body.truncate)
    if rows[0].values.numel() != 1:
        raise RefusedError(
            400, f"the head has {rows[0].values.numel()} outputs, and texts are ranked by one; use /predict"
        )
    scores = torch.cat([row.values for row in rows])
    scores = scores if body.raw_scores else scores.sigmoid()
    order = scores.argsort(descending=True).tolist()
    texts = body.texts if body.return_text else None
    ranks = [{"index": row, "score": float(scores[row]), **({"text": texts[row]} if texts else {})} for row in order]
    return answer(ranks, [row.version for row in rows])


@router.get("/info")
async def info(call: Here) -> dict[str, Any]:
    """What is served, and its limits."""
    server, limits = call.server, call.server.settings
    return {
        "model_id": server.base.name,
        "model_dtype": str(server.base.model.dtype).removeprefix("torch."),
        "works": server.base.works,
        "adapters": len(server.registry.versions(call.key)),
        "slots": limits.slots,
        "max_input_length": server.longest,
        "max_batch_tokens": limits.batch_tokens,
        "max_batch_requests": limits.batch_rows,
        "max_client_batch_size": limits.queue,
        "version": __version__,
    }


def classes_of(row: Row, server: Server, least: float) -> dict[str, Any]:
    """The likeliest class of a row with all probabilities, the number of a head of one output, or the entities.

    Args:
        row: with what came out.
        server: which has the names of classes.
        least: probability of a class that is named; where the likeliest has less, the row abstains.
    """
    if row.read.offsets is not None:
        return {**whose(row.version), "entities": _entities(row, server)}
    if row.values.numel() == 1:
        return {**whose(row.version), "label": None, "score": float(row.values), "probs": [], "num_classes": 0}
    # In double precision, so that they add up to one.
    probabilities, labels = row.values.double().softmax(-1), _labels(row, server)
    best = int(probabilities.argmax())
    score = float(probabilities[best])
    # Nobody who passes the field over may act on a label.
    named = {"label": None if score < least else labels[best], "score": score, "abstained": score < least}
    every = {"probs": probabilities.tolist(), "labels": labels, "num_classes": len(labels)}
    return {**whose(row.version), **named, **every}


def _labels(row: Row, server: Server) -> list[str]:
    version, count, names = row.version, row.values.shape[-1], server.base.model.config.id2label
    # Without a head of its own it has that of the base.
    if version is not None and version.source.content.whole:
        labels = version.labels
    else:
        labels = tuple(names[index] for index in sorted(names))
    if len(labels) == count:
        return list(labels)
    if row.read.offsets is not None:
        message = f"the adapter {whose(row.version)['adapter']!r} has no names of its {count} classes, by which tokens "
        raise RefusedError(422, f"{message}become entities; put it again with labels=, one for each", "adapter_error")
    return [f"LABEL_{index}" for index in range(count)]


def _entities(row: Row, server: Server) -> list[dict[str, Any]]:
    assert row.read.offsets is not None, "of a text"
    return entities_in(row.read.text, row.read.offsets, row.values, _labels(row, server))


def _scores(row: Row, server: Server, body: Predict) -> list[dict[str, Any]]:
    if row.read.offsets is not None:
        return _entities(row, server)
    default = "none" if body.raw_scores else "sigmoid" if row.values.numel() == 1 else "softmax"
    scores = _FUNCTIONS[body.parameters.function_to_apply or default](row.values)
    labels = _labels(row, server)
    order = scores.argsort(descending=True)[: body.parameters.top_k].tolist()
    return [{"label": labels[index], "score": float(scores[index])} for index in order]


_FUNCTIONS = {"none": Tensor.float, "sigmoid": Tensor.sigmoid, "softmax": lambda values: values.double().softmax(-1)}
