"""A batch of an encoder: classes by the head of each row's adapter, or embeddings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..recipes.files import read_json
from .base import Base
from .requests import Answer, Request, not_finite
from .scheduler import Batch

Pooling = Literal["mean", "cls", "lasttoken"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


class Encoder:
    """The forward pass of an encoder.

    Args:
        base: with its bank.
    """

    def __init__(self, base: Base) -> None:
        self.base, self.pooling = base, pooling_of(Path(base.source))

    @torch.no_grad()
    def run(self, batch: Batch) -> list[tuple[Request, Answer]]:
        """The answers of a batch."""
        inputs = self._padded(batch.requests)
        model = self.base.model
        rows = self.base.enter([request.adapter for request in batch.requests])
        if batch.kind == "embed":
            hidden = model.base_model(**inputs).last_hidden_state
            values = list(pooled(hidden, inputs["attention_mask"], self.pooling).cpu())
        else:
            logits = model(**inputs).logits.float().cpu()
            values = rows.split(logits) if rows is not None and rows.widths else list(logits)
        answers = [Answer(value) if value.isfinite().all() else Answer(error=not_finite()) for value in values]
        return list(zip(batch.requests, answers, strict=True))

    def drop(self, requests: Sequence[Request]) -> None:
        """Nothing is kept of requests."""

    def _padded(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        columns: dict[str, Any] = {"input_ids": [request.tokens for request in requests]}
        if requests[0].token_types is not None:
            columns["token_type_ids"] = [request.token_types for request in requests]
        padded = self.base.tokenizer.pad(columns, return_tensors="pt")
        return {name: column.to(self.base.device) for name, column in padded.items()}


def pooling_of(folder: Path) -> Pooling:
    """How a sentence encoder makes one vector of its tokens', by sentence-transformers' file; else their mean."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    settings = read_json(file)
    chosen = [name for name in POOLINGS if settings.get(f"pooling_mode_{name}{_SUFFIX[name]}")]
    if len(chosen) != 1:
        raise ValueError(f"{file} asks for another pooling than one of {', '.join(POOLINGS)}: {json.dumps(settings)}")
    return chosen[0]


_SUFFIX = {"mean": "_tokens", "cls": "_token", "lasttoken": ""}


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One vector of length one for each row.

    Args:
        hidden: of all tokens, (rows, tokens, width).
        mask: 1 for tokens of the text, (rows, tokens).
        pooling: how.
    """
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), last]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
