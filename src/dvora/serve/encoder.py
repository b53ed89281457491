"""A batch of an encoder: classes by the head of each row's adapter, or embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes.models.pooling import pooled, pooling_of
from .base import Base
from .requests import Answer, Request, not_finite
from .scheduler import Batch


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
        if any(request.token_types is not None for request in requests):
            # Tokens that a client sends have none.
            columns["token_type_ids"] = [request.token_types or [0] * len(request.tokens) for request in requests]
        padded = self.base.tokenizer.pad(columns, return_tensors="pt")
        return {name: column.to(self.base.model.device) for name, column in padded.items()}
